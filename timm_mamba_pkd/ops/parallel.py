"""The selective scan in plain PyTorch, parallel over chunks of time, with its own backward.

Time is cut into chunks of about 8 steps. All chunks step together, first from a zero state to learn what each adds;
their last states are then carried across the chunks one by one; then all step together again from the right state.
Nothing is divided by a product of decays and nothing leaves the linear domain, so no step size overflows.

Only the inputs are kept for the backward, which recomputes the states. The gradient g_t of the state h_t obeys the
same recurrence against time, g_t = C_t dy_t + a_{t+1} g_{t+1} with a_t = exp(delta_t A).

Tensors are laid out (time, batch, states, channels): a step is a slab of contiguous memory, a neighbour in time is a
view, and the channels are the vectorised axis.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mamba_pkd.ops.contract import compute_dtype

CHUNK = 8
BLOCK_PER_CPU_THREAD = 2**19  # elements of (time, batch, states, channels) at a time: what stays in the cache
BLOCK_ON_DEVICE = 2**27


def unavailable(device: torch.device) -> None:
    """Nothing: it runs wherever PyTorch does."""


def saved_shape(u: Tensor, A: Tensor) -> list[int]:
    """Nothing is saved for the backward."""
    return [0]


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
    """y (batch, channels, length), in the dtype and layout of u; nothing is saved for the backward."""
    dtype = compute_dtype(u, delta, A, B, C)
    y = torch.empty_like(u)
    for rows in _batch_blocks(u, A):
        scan = _scan(rows, u, delta, A, B, C, delta_bias, delta_softplus, reverse)
        out = scan.output(D)
        if z is not None:
            out *= F.silu(_time_first(z, rows, dtype, len(out)))
        _store(out, y, rows)
    return y, y.new_empty(0, dtype=dtype)


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
    dtype = compute_dtype(u, delta, A, B, C)
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    dz = None if z is None else torch.empty_like(z)
    dA = torch.zeros_like(A.T, dtype=dtype, memory_format=torch.contiguous_format)
    dD, dbias = torch.zeros_like(dA[0]), torch.zeros_like(dA[0])

    for rows in _batch_blocks(u, A):
        scan = _scan(rows, u, delta, A, B, C, delta_bias, delta_softplus, reverse)
        dout = _time_first(dy, rows, dtype, len(scan.x))
        if z is not None and dz is not None:
            gate_input = _time_first(z, rows, dtype, len(scan.x))
            gate = gate_input.sigmoid()
            _store(dout * scan.output(D) * gate * (1 + gate_input * (1 - gate)), dz, rows)
            dout *= gate_input * gate
        _store(_contract_channels(scan.h[1:-1], dout), dC, rows)

        g = dout.unsqueeze(2) * scan.C.unsqueeze(3)
        _solve(g, scan.decay[:-2] if reverse else scan.decay[2:], backwards=not reverse)
        _store(_contract_channels(g, scan.step * scan.x), dB, rows)
        dinput = _contract_states(scan.B, g)
        dx, dstep = dinput * scan.step, dinput * scan.x
        if D is not None:
            dx += dout * D
            dD += (dout * scan.x).sum((0, 1))
        _store(dx, du, rows)

        dlog_decay = g.mul_(scan.decay[1:-1]).mul_(scan.h[2:] if reverse else scan.h[:-2])
        dstep += (dlog_decay * scan.A).sum(2)
        dA += dlog_decay.mul_(scan.step.unsqueeze(2)).sum((0, 1))
        if delta_softplus:
            dstep *= scan.raw_step.sigmoid()
        dbias += dstep.sum((0, 1))
        _store(dstep, ddelta, rows)

    return [
        du,
        ddelta,
        torch.empty_like(A).copy_(dA.T),
        dB,
        dC,
        None if D is None else dD.to(D.dtype),
        dz,
        None if delta_bias is None else dbias.to(delta_bias.dtype),
    ]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """silu of the causal depthwise convolution of x (batch, channels, length), in the dtype and layout of x."""
    rows, kernel, offset = _convolution(x, weight, bias, reverse)
    return torch.empty_like(x).copy_(F.silu(_convolve(rows, kernel, offset, reverse)))


def convolve_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> list[Tensor | None]:
    """The gradients of x, weight and bias, each in the dtype and layout of its input."""
    rows, kernel, offset = _convolution(x, weight, bias, reverse)
    dpre = torch.ops.aten.silu_backward(dy.to(rows.dtype), _convolve(rows, kernel, offset, reverse))
    margin = weight.shape[1] - 1
    dpre = F.pad(dpre, (margin, 0) if reverse else (0, margin)).unsqueeze(2)
    drows, dkernel, doffset = torch.ops.aten.convolution_backward(
        dpre.contiguous(memory_format=torch.channels_last), rows, kernel, [x.shape[1]],
        [1, 1], [0, margin], [1, 1], False, [0, 0], x.shape[1], [True, True, bias is not None],
    )  # fmt: skip
    dweight = dkernel[:, 0, 0]
    return [
        torch.empty_like(x).copy_(drows.squeeze(2)),
        torch.empty_like(weight).copy_(dweight.flip(-1) if reverse else dweight),
        None if bias is None else torch.empty_like(bias).copy_(doffset),
    ]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments of a 2D convolution in channels-last layout: 1.5 times faster on a CPU than the 1D one."""
    dtype = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    kernel = (weight.flip(-1) if reverse else weight).to(dtype)[:, None, None]
    rows = x.to(dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)
    return rows, kernel, None if bias is None else bias.to(dtype)


def _convolve(rows: Tensor, kernel: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    length, margin = rows.shape[3], kernel.shape[3] - 1
    y = F.conv2d(rows, kernel, bias, padding=(0, margin), groups=rows.shape[1]).squeeze(2)
    return y[:, :, margin:] if reverse else y[:, :, :length]


class _Scan(NamedTuple):
    """A block of the batch after its states are known, padded in time by zero inputs, which leave no trace.

    x, raw_step (before softplus) and step: (time, batch, channels). A: (states, channels). B, C: (time, batch, states).
    decay = exp(step A) and h: (1 + time + 1, batch, states, channels), with a zero step on each side.
    """

    x: Tensor
    raw_step: Tensor
    step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor
    h: Tensor

    def output(self, D: Tensor | None) -> Tensor:
        """C_t h_t + D x_t, before the gate: (time, batch, channels)."""
        y = _contract_states(self.C, self.h[1:-1])
        return y if D is None else y.addcmul_(self.x, D.to(y.dtype))


def _scan(
    rows: slice,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> _Scan:
    dtype = compute_dtype(u, delta, A, B, C)
    length = u.shape[2]
    chunks = -(-length // CHUNK)
    padded = chunks * -(-length // chunks)
    x, raw_step, B, C = (_time_first(t, rows, dtype, padded) for t in (u, delta, B, C))
    A = A.T.to(dtype).contiguous()
    if delta_bias is not None:
        raw_step += delta_bias
    step = F.softplus(raw_step) if delta_softplus else raw_step

    decay = x.new_empty(padded + 2, x.shape[1], *A.shape)
    h = torch.empty_like(decay)
    for margin in (decay[0], decay[-1], h[0], h[-1]):
        margin.zero_()
    torch.mul(step.unsqueeze(2), A, out=decay[1:-1]).exp_()
    torch.mul((step * x).unsqueeze(2), B.unsqueeze(3), out=h[1:-1])
    _solve(h[1:-1], decay[1:-1], backwards=reverse)
    return _Scan(x, raw_step, step, A, B, C, decay, h)


def _solve(x: Tensor, decay: Tensor, backwards: bool) -> None:
    """x_t += decay_t x_{t-1} in place, or x_{t+1} if backwards; both (time, ...), time a multiple of the chunks."""
    chunks = -(-len(x) // CHUNK)
    x, decay = x.unflatten(0, (chunks, -1)), decay.unflatten(0, (chunks, -1))
    direction = -1 if backwards else 1
    first, *rest = range(x.shape[1])[::direction]

    total, last = decay[:, first].clone(), x[:, first].clone()
    for t in rest:
        torch.addcmul(x[:, t], decay[:, t], last, out=last)
        total *= decay[:, t]

    before = torch.empty_like(last)
    state = torch.zeros_like(last[0])
    for chunk in range(chunks)[::direction]:
        before[chunk] = state
        state = torch.addcmul(last[chunk], total[chunk], state)

    for t in (first, *rest):
        before = x[:, t].addcmul_(decay[:, t], before)


def _contract_states(weights: Tensor, states: Tensor) -> Tensor:
    """(time, batch, states) and (time, batch, states, channels) to (time, batch, channels)."""
    return torch.matmul(weights.unsqueeze(2), states).squeeze(2)


def _contract_channels(states: Tensor, weights: Tensor) -> Tensor:
    """(time, batch, states, channels) and (time, batch, channels) to (time, batch, states)."""
    return torch.matmul(states, weights.unsqueeze(3)).squeeze(3)


def _batch_blocks(u: Tensor, A: Tensor) -> Iterator[slice]:
    """Slices of the batch whose states fit the cache."""
    batch, channels, length = u.shape
    budget = BLOCK_PER_CPU_THREAD * torch.get_num_threads() if u.device.type == "cpu" else BLOCK_ON_DEVICE
    size = max(1, budget // (length * channels * A.shape[1]))
    for start in range(0, batch, size):
        yield slice(start, start + size)


def _time_first(tensor: Tensor, rows: slice, dtype: torch.dtype, padded: int) -> Tensor:
    """Rows of (batch, features, length) as contiguous (padded length, batch, features), zero behind the length."""
    tensor = tensor[rows].permute(2, 0, 1)
    out = tensor.new_zeros(padded, *tensor.shape[1:], dtype=dtype)
    out[: len(tensor)] = tensor
    return out


def _store(tensor: Tensor, out: Tensor, rows: slice) -> None:
    """The inverse of _time_first, into the given rows."""
    out[rows] = tensor[: out.shape[2]].permute(1, 2, 0)
