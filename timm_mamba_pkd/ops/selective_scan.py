"""The selective scan as a PyTorch operator: its registration and the public function."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from timm_mamba_pkd.ops.backends import Backend, resolve
from timm_mamba_pkd.ops.contract import check_arguments, compute_dtype, refuse_forward_mode
from timm_mamba_pkd.ops.exportable import selective_scan_exportable
from timm_mamba_pkd.ops.reference import selective_scan_reference

# FX cannot trace their checks and loops.
torch.fx.wrap("selective_scan_exportable")
torch.fx.wrap("selective_scan_reference")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Selective state space recurrence S6 of Mamba (Gu and Dao, 2023, arXiv:2312.00752); mamba-ssm's selective_scan_fn.

    With delta = softplus(delta + delta_bias), per batch element, channel d and state n::

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        h_0 = 0
        y_t = (sum over n of C_t h_t + D u_t) * silu(z_t)

    Args:
        u: Input, (batch, channels, length). Like every tensor here: float, of any strides; dtypes may differ.
        delta: Step size, (batch, channels, length).
        A: State matrix, real and diagonal, (channels, states); negative for a state that decays.
        B: Input matrix, (batch, states, length).
        C: Output matrix, (batch, states, length).
        D: Skip connection, (channels,).
        z: Gate, (batch, channels, length).
        delta_bias: Added to delta, (channels,).
        delta_softplus: Pass delta (with its bias) through softplus.
        reverse: Run time backwards, as if all inputs and the output were flipped along the length.
        backend: "auto", the first of ``BACKENDS`` that can serve, or the one that the environment variable
            ``TIMM_MAMBA_PKD_SCAN`` names; a key of ``BACKENDS``; "reference", step by step; or "exportable", for
            exporters that know no custom operators. The last two are PyTorch's operators, differentiated by autograd
            and not counted by FLOP counters; all others are one operator.

    Returns:
        y, (batch, channels, length), in the dtype of u. The arithmetic is float32, or float64 if one of
        u, delta, A, B, C is; never less under autocast.

    Raises:
        ValueError: Unknown backend, one that cannot serve here, or an argument of the wrong shape, dtype or device.
        NotImplementedError: Forward-mode differentiation, which only "reference" and "exportable" have.
    """
    if backend == "reference":
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    if backend == "exportable":
        return selective_scan_exportable(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    if not torch.jit.is_scripting():
        refuse_forward_mode([u, delta, A, B, C, D, z, delta_bias])
    save = torch.is_grad_enabled() or torch.jit.is_tracing()  # a trace serves with and without gradients
    return torch.ops.timm_mamba_pkd.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save, backend
    )[0]


@torch.library.custom_op("timm_mamba_pkd::selective_scan", mutates_args=())
def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    chosen = resolve(backend, u.device)
    if u.numel() == 0:
        return _outputs(u, delta, A, B, C, save, chosen)
    with torch.autocast(u.device.type, enabled=False):
        return chosen.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save)


@_forward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    chosen = resolve(backend, u.device)
    return _outputs(u, delta, A, B, C, save, chosen)


def _outputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, save: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Memory for what a backend's forward returns."""
    saved = u.new_empty(backend.saved_shape(u, A) if save else [0], dtype=compute_dtype(u, delta, A, B, C))
    return torch.empty_like(u), saved


@torch.library.custom_op("timm_mamba_pkd::selective_scan_backward", mutates_args=())
def _backward(
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
    backend: str,
) -> list[Tensor]:
    if u.numel() == 0:
        return [torch.zeros_like(t) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]
    chosen = resolve(backend, u.device)
    with torch.autocast(u.device.type, enabled=False):
        grads = chosen.backward(dy, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return [grad for grad in grads if grad is not None]


@_backward.register_fake
def _(
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
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, delta_softplus, reverse, _, backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = (delta_softplus, reverse, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # it would fill one for what was saved, too


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved, *tensors = ctx.saved_tensors  # activation checkpointing allows one look
    if dy is None:
        return (None,) * (len(tensors) + 4)
    grads = iter(torch.ops.timm_mamba_pkd.selective_scan_backward(dy, saved, *tensors, *ctx.options))
    return (*(None if t is None else next(grads) for t in tensors), *(None for _ in range(4)))


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.timm_mamba_pkd.selective_scan])
def _forward_flops(u: list[int], delta: list[int], A: list[int], *args: Any, **kwargs: Any) -> int:
    """VMamba's count (arXiv:2401.10166), whatever the backend and options. Multiply-accumulates are half of it."""
    batch, channels, length = u
    return 9 * batch * length * channels * A[1] + 2 * batch * length * channels


@register_flop_formula([torch.ops.timm_mamba_pkd.selective_scan_backward])
def _backward_flops(
    dy: list[int], saved: list[int], u: list[int], delta: list[int], A: list[int], *args: Any, **kwargs: Any
) -> int:
    """Twice the forward, the usual convention: one more product for each of the two factors of a product."""
    return 2 * _forward_flops(u, delta, A)
