"""What every selective scan and convolution promises about its arguments; TorchScript can compile this file."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, unless all are real floating tensors of matching shapes on one device."""
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, channels, length), got shape {list(u.shape)}")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(f"A must be (channels, states) = ({channels}, at least 1), got shape {list(A.shape)}")
    states = A.shape[1]
    _check(u, "u", "(batch, channels, length)", [batch, channels, length], u.device)
    _check(delta, "delta", "(batch, channels, length)", [batch, channels, length], u.device)
    _check(A, "A", "(channels, states)", [channels, states], u.device)
    _check(B, "B", "(batch, states, length)", [batch, states, length], u.device)
    _check(C, "C", "(batch, states, length)", [batch, states, length], u.device)
    if D is not None:
        _check(D, "D", "(channels,)", [channels], u.device)
    if z is not None:
        _check(z, "z", "(batch, channels, length)", [batch, channels, length], u.device)
    if delta_bias is not None:
        _check(delta_bias, "delta_bias", "(channels,)", [channels], u.device)


def check_convolution_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError, naming the argument, unless all are real floating tensors of matching shapes on one device."""
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, channels, length), got shape {list(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels, width) = ({channels}, at least 1), got shape {list(weight.shape)}")
    _check(x, "x", "(batch, channels, length)", list(x.shape), x.device)
    _check(weight, "weight", "(channels, width)", list(weight.shape), x.device)
    if bias is not None:
        _check(bias, "bias", "(channels,)", [channels], x.device)


def _check(tensor: Tensor, name: str, meaning: str, shape: list[int], device: torch.device) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {shape}, got shape {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a real floating tensor, got {tensor.dtype} (shape {shape})")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the input is, got {tensor.device} (shape {shape})")


def refuse_forward_mode(tensors: Sequence[Tensor | None]) -> None:
    """Raise NotImplementedError where forward-mode differentiation would pass over a custom operator in silence."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "the selective scan and its convolution have no forward-mode derivative (torch.func.jvp, jacfwd, "
            "forward_ad) but with backend='exportable' or 'reference'; in a model, create it with exportable=True"
        )


def compute_dtype(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """float64 if any of the five is float64, else float32."""
    for tensor in [u, delta, A, B, C]:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
