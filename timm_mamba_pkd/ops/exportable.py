"""The selective scan and its convolution in plain PyTorch operators, for exporters that know no custom ones.

Autograd differentiates them and TorchScript compiles them. The scan is that of Hillis and Steele (1986,
doi:10.1145/7902.7903): log2(length) rounds, each over all of time at once. Decays are only ever multiplied with each
other, so no step size overflows. There is no matrix product or convolution, which autocast would round.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops.contract import check_arguments, check_convolution_arguments, compute_dtype


def selective_scan_exportable(
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
    """:func:`~timm_mamba_pkd.ops.selective_scan`; an export fixes the length, any other dimension may be dynamic."""
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    dtype = compute_dtype(u, delta, A, B, C)
    x, step = _time_first(u, dtype), _time_first(delta, dtype)
    B, C = _time_first(B, dtype).unsqueeze(3), _time_first(C, dtype).unsqueeze(3)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)

    decay = torch.exp(step.unsqueeze(2) * A.to(dtype).T)  # (time, batch, states, channels), as h
    h = _accumulate((step * x).unsqueeze(2) * B, decay, reverse)
    y = (h * C).sum(2)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(_time_first(z, dtype))
    return y.permute(1, 2, 0).to(u.dtype)


def _time_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, features, length) to contiguous (length, batch, features)."""
    return tensor.permute(2, 0, 1).to(dtype).contiguous()


def _accumulate(h: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """h_t + decay_t h_{t-1} + decay_t decay_{t-1} h_{t-2} + ...; with t + 1, t + 2, ... if reverse. Time comes first.

    Before each round, h_t is the sum of the first ``span`` terms, and ``decay`` the product of as many decays, for
    those t that have so many predecessors.
    """
    decay = decay[:-1] if reverse else decay[1:]
    span = 1
    while span < max(h.shape[0], 2):  # at least one round, from which a single step's decay gets its gradient: zero
        if reverse:
            h = torch.cat([h[:-span] + decay * h[span:], h[-span:]])
        else:
            h = torch.cat([h[:span], h[span:] + decay * h[:-span]])
        decay = decay[span:] * decay[:-span]
        span *= 2
    return h


def causal_conv1d_silu_exportable(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """:func:`~timm_mamba_pkd.ops.causal_conv1d_silu`, tap by tap."""
    check_convolution_arguments(x, weight, bias)
    dtype = torch.float64 if x.dtype == torch.float64 or weight.dtype == torch.float64 else torch.float32
    length, width = x.shape[2], weight.shape[1]
    padded = F.pad(x.to(dtype), (0, width - 1) if reverse else (width - 1, 0))
    weight = (weight.flip(-1) if reverse else weight).to(dtype)
    y = weight[:, :1] * padded[:, :, :length]
    for tap in range(1, width):
        y = y + weight[:, tap, None] * padded[:, :, tap : tap + length]
    if bias is not None:
        y = y + bias.to(dtype)[:, None]
    return F.silu(y).to(x.dtype)
