"""The causal depthwise convolution with SiLU in front of the selective scan, as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from timm_mamba_pkd.ops.backends import resolve
from timm_mamba_pkd.ops.contract import check_convolution_arguments, refuse_forward_mode
from timm_mamba_pkd.ops.exportable import causal_conv1d_silu_exportable

torch.fx.wrap("causal_conv1d_silu_exportable")  # FX cannot trace its checks


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
        backend: As in ``selective_scan``; "reference" and "exportable" are the same.

    Returns:
        y, (batch, channels, length), in the dtype of x.

    Raises:
        ValueError: Unknown backend, one that cannot serve here, or an argument of the wrong shape, dtype or device.
        NotImplementedError: Forward-mode differentiation, as in ``selective_scan``.
    """
    if backend in ["reference", "exportable"]:
        return causal_conv1d_silu_exportable(x, weight, bias, reverse)
    if not torch.jit.is_scripting():
        refuse_forward_mode([x, weight, bias])
    return torch.ops.timm_mamba_pkd.causal_conv1d_silu(x, weight, bias, reverse, backend)


@torch.library.custom_op("timm_mamba_pkd::causal_conv1d_silu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> Tensor:
    check_convolution_arguments(x, weight, bias)
    chosen = resolve(backend, x.device)
    if x.numel() == 0:
        return torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        return chosen.convolve(x, weight, bias, reverse)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> Tensor:
    check_convolution_arguments(x, weight, bias)
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
