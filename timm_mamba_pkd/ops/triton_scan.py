"""The selective scan in Triton, on GPUs, for sequences short enough to need no parallelism over time.

All is fused: bias, softplus, scan, skip and gate. The forward leaves the states before every fourth step, from which
the backward recomputes the others. Sums over sequences and over blocks of channels are written apart and added
afterwards, so that two runs agree bit for bit.

Tensors that are not float32, bfloat16 or float16 and sequences longer than ``LONGEST`` go to the parallel backend, and
so does the convolution. With ``TRITON_INTERPRET=1``, set before Triton is imported, it runs on the CPU, for tests.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from timm_mamba_pkd.ops import parallel
from timm_mamba_pkd.ops.contract import compute_dtype

LONGEST = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK, _CHANNELS = 4, 32
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot serve on a device; None if it can. Shapes alone ("meta") it can wherever Triton is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA, not on {device}, unless TRITON_INTERPRET=1 makes Triton interpret it"
    return None


def saved_shape(u: Tensor, A: Tensor) -> list[int]:
    """Shape of what the forward saves for the backward."""
    batch, channels, length = u.shape
    return [0] if length > LONGEST else [batch, -(-length // _CHUNK), channels, A.shape[1]]


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length), in the dtype and layout of u, and the checkpoints, empty unless ``save``."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    saved = u.new_empty(saved_shape(u, A) if save else 0, dtype=compute_dtype(u, delta, A, B, C))
    if not _serves(*tensors):
        return parallel.forward(*tensors, delta_softplus, reverse, save)[0], saved
    y = torch.empty_like(u)
    batch, channels, length = u.shape
    with torch.cuda.device_of(u):
        _kernels().forward[batch * _blocks(u),](
            *_arguments(*tensors), _with_strides(y), saved if save else None, channels, length,
            *_constants(A, delta_softplus, reverse), **_OPTIONS,
        )  # fmt: skip
    return y, saved


def backward(
    dy: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias, each in the dtype and layout of its input."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if not _serves(dy, *tensors):
        return parallel.backward(dy, saved, *tensors, delta_softplus, reverse)
    if saved.numel() == 0:
        saved = forward(*tensors, delta_softplus, reverse, save=True)[1]
    batch, channels, length = u.shape
    du, ddelta, dz = (None if tensor is None else torch.empty_like(tensor) for tensor in (u, delta, z))
    dA = saved.new_empty(batch, channels, A.shape[1])
    dB, dC = (saved.new_empty(_blocks(u), batch, length, A.shape[1]) for _ in range(2))
    dD, dbias = (None if tensor is None else saved.new_empty(batch, channels) for tensor in (D, delta_bias))
    with torch.cuda.device_of(u):
        _kernels().backward[batch * _blocks(u),](
            _with_strides(dy), saved, *_arguments(*tensors),
            _with_strides(du), _with_strides(ddelta), dA, dB, dC, dD, _with_strides(dz), dbias, batch, channels, length,
            *_constants(A, delta_softplus, reverse), **_OPTIONS,
        )  # fmt: skip
    return [
        du,
        ddelta,
        torch.empty_like(A).copy_(dA.sum(0)),
        torch.empty_like(B).copy_(dB.sum(0).transpose(1, 2)),
        torch.empty_like(C).copy_(dC.sum(0).transpose(1, 2)),
        None if dD is None or D is None else torch.empty_like(D).copy_(dD.sum(0)),
        dz,
        None if dbias is None or delta_bias is None else torch.empty_like(delta_bias).copy_(dbias.sum(0)),
    ]


convolve = parallel.convolve
convolve_backward = parallel.convolve_backward


def _serves(*tensors: Tensor | None) -> bool:
    first = tensors[0]
    assert first is not None
    return first.shape[2] <= LONGEST and all(tensor is None or tensor.dtype in _DTYPES for tensor in tensors)


def _kernels() -> Any:
    """Imported at the first call, because Triton may be missing."""
    from timm_mamba_pkd.ops import triton_kernels

    return triton_kernels


def _arguments(u: Tensor, delta: Tensor, A: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The inputs as the kernels take them: A contiguous, the others with their strides."""
    A = A.float().resolve_neg().contiguous()
    return (_with_strides(u), _with_strides(delta), A, *map(_with_strides, others))


def _with_strides(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    tensor = tensor.resolve_neg()
    return (tensor, *tensor.stride())


def _constants(A: Tensor, delta_softplus: bool, reverse: bool) -> tuple[bool | int, ...]:
    states = A.shape[1]
    return delta_softplus, reverse, states, 1 << (states - 1).bit_length(), _CHANNELS, _CHUNK


def _blocks(u: Tensor) -> int:
    return -(-u.shape[1] // _CHANNELS)
