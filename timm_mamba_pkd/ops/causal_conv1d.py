"""The causal depthwise convolution with SiLU in front of the selective scan, as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from timm_mamba_pkd.ops.backends import resolve


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Causal depthwise convolution, then SiLU: mamba-ssm's causal_conv1d_fn with ``activation="silu"``.

    y_t = silu(bias + sum over k of weight_k x_{t - width + 1 + k}), with zeros before the first step.

    Args:
        x: (batch, channels, length), float, of any strides.
        weight: (channels, width). Its dtype may differ from that of x; the arithmetic is float32 or better.
        bias: (channels,).
        reverse: Run time backwards, as if x and y were flipped along the length.
        backend: "auto" or a key of ``BACKENDS``, as in ``selective_scan``.

    Returns:
        y, (batch, channels, length), in the dtype of x.

    Raises:
        ValueError: Unknown backend, one that cannot serve here, or an argument of the wrong shape, dtype or device.
    """
    return torch.ops.timm_mamba_pkd.causal_conv1d_silu(x, weight, bias, reverse, backend)


@torch.library.custom_op("timm_mamba_pkd::causal_conv1d_silu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> Tensor:
    _check_arguments(x, weight, bias)
    chosen = resolve(backend, x.device)
    if x.numel() == 0:
        return torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        return chosen.convolve(x, weight, bias, reverse)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> Tensor:
    _check_arguments(x, weight, bias)
    resolve(backend, x.device)
    return torch.empty_like(x)


@torch.library.custom_op("timm_mamba_pkd::causal_conv1d_silu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> list[Tensor]:
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in (x, weight, bias) if t is not None]
    with torch.autocast(x.device.type, enabled=False):
        grads = resolve(backend, x.device).convolve_backward(dy, x, weight, bias, reverse)
    return [grad for grad in grads if grad is not None]


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, weight, bias) if t is not None]


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, channels, length), got shape {list(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels, width) = ({channels}, at least 1), got shape {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [channels]:
        raise ValueError(f"bias must be (channels,) = [{channels}], got shape {list(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a real floating tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # activation checkpointing allows one look
    grads = iter(torch.ops.timm_mamba_pkd.causal_conv1d_silu_backward(dy, *saved, *ctx.options))
    return (*(None if t is None else next(grads) for t in saved), None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.timm_mamba_pkd.causal_conv1d_silu])
def _forward_flops(x: list[int], weight: list[int], *args: Any, **kwargs: Any) -> int:
    """Two for each of the products, as of any convolution."""
    batch, channels, length = x
    return 2 * batch * channels * length * weight[1]


@register_flop_formula([torch.ops.timm_mamba_pkd.causal_conv1d_silu_backward])
def _backward_flops(dy: list[int], x: list[int], weight: list[int], *args: Any, **kwargs: Any) -> int:
    """Once for the gradient of x and once for that of weight."""
    return 2 * _forward_flops(x, weight)
