"""The selective scan written as its definition. Slow, and the truth: every backend is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops.contract import check_arguments, compute_dtype


def selective_scan_reference(
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
) -> Tensor:
    """:func:`~timm_mamba_pkd.ops.selective_scan`, one step at a time, differentiated by autograd."""
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        return u.clone()
    dtype = compute_dtype(u, delta, A, B, C)
    x, delta, A, B, C = u.to(dtype), delta.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    times = [t for t in range(u.shape[2])]  # noqa: C416 - TorchScript has no list(range)
    if reverse:
        times.reverse()
    h = torch.zeros(u.shape[0], u.shape[1], A.shape[1], dtype=dtype, device=u.device)
    outputs: list[Tensor] = []
    for t in times:
        delta_t = delta[:, :, t, None]
        h = torch.exp(delta_t * A) * h + delta_t * x[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    if reverse:
        outputs.reverse()

    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)
