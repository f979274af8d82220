# type: ignore - Python's types do not describe what Triton compiles
"""The Triton kernels of ``triton_scan``, apart from it because this file imports Triton.

A program is one warp: a tile (STATES, CHANNELS) of one sequence, its states padded to a power of two, stepping through
time. Triton gives it the layout of the loads of A and of the checkpoints, in which the states are contiguous: with 16
states and 32 channels a thread holds 4 of the states of 4 channels, so that neither the sums over the states (y) nor
those over the channels (the gradients of B and C) take many shuffles.

A tensor comes as a tuple of itself and its strides, an absent one as None. Time is unrolled by chunks, in which all
loads can be issued before the first state is known; behind the end a step is 0, which changes no state.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(x, b, d):
    """Pointers to the first step of channels or states d of a sequence."""
    return x[0] + b.to(tl.int64) * x[1] + d.to(tl.int64) * x[2]


@triton.jit
def _load(pointers, x, t, mask):
    return tl.load(pointers + tl.cast(t, tl.int64) * x[3], mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, x, t, value, mask):
    tl.store(pointers + tl.cast(t, tl.int64) * x[3], value, mask)


@triton.jit
def _per_channel(x, d, channels):
    return tl.load(x[0] + d * x[1], d < channels, other=0.0).to(tl.float32)


@triton.jit
def _softplus(x):
    """As torch's, the identity above 20. log(1 + e) is the series of 2 artanh(e / (2 + e)): right for small e, too."""
    e = tl.exp(-tl.abs(x))
    s = e / (e + 2.0)
    s2 = s * s
    p = s2 * (2.0 / 13) + 2.0 / 11
    p = p * s2 + 2.0 / 9
    p = p * s2 + 2.0 / 7
    p = p * s2 + 2.0 / 5
    p = p * s2 + 2.0 / 3
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + s * (p * s2 + 2.0))


@triton.jit
def _tile(channels, CHANNELS: tl.constexpr, STATES: tl.constexpr):
    """Of this program: the block of channels and the sequence, its channels and all states."""
    blocks = tl.cdiv(channels, CHANNELS)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    return block, b, block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)


@triton.jit
def _step(number, d, n, channels, states, length, REVERSE: tl.constexpr):
    """Of a step in the order of the recurrence: its time, whether it is inside, and the masks of its rows."""
    inside = number < length
    t = length - 1 - number if REVERSE else number
    return t, inside, d < tl.where(inside, channels, 0), n < tl.where(inside, states, 0)


@triton.jit
def _offsets(row, d, n, channels, states):
    """Of the tile in a row of a contiguous (rows, channels, states)."""
    return (tl.cast(row, tl.int64) * channels + d[None, :]) * states + n[:, None]


@triton.jit
def forward(
    u, delta, A, B, C, D, z, delta_bias, y, saved, channels, length,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    _, b, d, n = _tile(channels, CHANNELS, STATES)
    in_tile = (n < states)[:, None] & (d < channels)[None, :]
    A_tile = tl.load(A + _offsets(0, d, n, channels, states), in_tile, other=0.0) * LOG2E
    u_at, delta_at, y_at = _sequence(u, b, d), _sequence(delta, b, d), _sequence(y, b, d)
    B_at, C_at = _sequence(B, b, n), _sequence(C, b, n)
    if z is not None:
        z_at = _sequence(z, b, d)
    if D is not None:
        D_row = _per_channel(D, d, channels)
    if delta_bias is not None:
        bias = _per_channel(delta_bias, d, channels)

    h = tl.zeros_like(A_tile)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in range(chunks):
        if saved is not None:
            tl.store(saved + _offsets(b * chunks + chunk, d, n, channels, states), h, in_tile)
        outputs = ()
        for i in tl.static_range(CHUNK):
            t, inside, is_channel, is_state = _step(chunk * CHUNK + i, d, n, channels, states, length, REVERSE)
            x = _load(u_at, u, t, is_channel)
            step = _load(delta_at, delta, t, is_channel)
            if delta_bias is not None:
                step += bias
            if SOFTPLUS:
                step = _softplus(step)
            step = tl.where(inside, step, 0.0)
            B_t = _load(B_at, B, t, is_state)[:, None]
            C_t = _load(C_at, C, t, is_state)[:, None]
            h = tl.exp2(step[None, :] * A_tile) * h + (step * x)[None, :] * B_t
            out = tl.sum(h * C_t, 0)
            if D is not None:
                out += D_row * x
            if z is not None:
                gate = _load(z_at, z, t, is_channel)
                out *= gate * tl.sigmoid(gate)
            outputs += (out,)
        for i in tl.static_range(CHUNK):
            t, inside, is_channel, is_state = _step(chunk * CHUNK + i, d, n, channels, states, length, REVERSE)
            _store(y_at, y, t, outputs[i], is_channel)


@triton.jit
def backward(
    dy, saved, u, delta, A, B, C, D, z, delta_bias, du, ddelta, dA, dB, dC, dD, dz, dbias,
    batch, channels, length,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    states: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dA, dD and dbias are per sequence, (batch, ...); dB and dC per block, (blocks, batch, length, states)."""
    block, b, d, n = _tile(channels, CHANNELS, STATES)
    in_tile = (n < states)[:, None] & (d < channels)[None, :]
    A_tile = tl.load(A + _offsets(0, d, n, channels, states), in_tile, other=0.0) * LOG2E
    dy_at, u_at, delta_at = _sequence(dy, b, d), _sequence(u, b, d), _sequence(delta, b, d)
    du_at, ddelta_at = _sequence(du, b, d), _sequence(ddelta, b, d)
    B_at, C_at = _sequence(B, b, n), _sequence(C, b, n)
    if z is not None:
        z_at, dz_at = _sequence(z, b, d), _sequence(dz, b, d)
    if D is not None:
        D_row = _per_channel(D, d, channels)
        dD_sum = tl.zeros_like(D_row)
    if delta_bias is not None:
        bias = _per_channel(delta_bias, d, channels)
        dbias_sum = tl.zeros_like(bias)
    first_row = (block.to(tl.int64) * batch + b) * length

    g = tl.zeros_like(A_tile)
    dA_sum = tl.zeros_like(A_tile)
    chunks = tl.cdiv(length, CHUNK)
    for number in range(chunks):
        chunk = chunks - 1 - number
        h = tl.load(saved + _offsets(b * chunks + chunk, d, n, channels, states), in_tile, other=0.0)
        h_before, steps = (), ()
        for i in tl.static_range(CHUNK):
            t, inside, is_channel, is_state = _step(chunk * CHUNK + i, d, n, channels, states, length, REVERSE)
            x = _load(u_at, u, t, is_channel)
            raw = _load(delta_at, delta, t, is_channel)
            if delta_bias is not None:
                raw += bias
            step = _softplus(raw) if SOFTPLUS else raw
            step = tl.where(inside, step, 0.0)
            B_t = _load(B_at, B, t, is_state)[:, None]
            h_before += (h,)
            steps += ((x, raw, step, B_t),)
            h = tl.exp2(step[None, :] * A_tile) * h + (step * x)[None, :] * B_t
        for i in tl.static_range(CHUNK - 1, -1, -1):
            t, inside, is_channel, is_state = _step(chunk * CHUNK + i, d, n, channels, states, length, REVERSE)
            x, raw, step, B_t = steps[i]
            C_t = _load(C_at, C, t, is_state)[:, None]
            dout = _load(dy_at, dy, t, is_channel)
            if z is not None:
                gate = _load(z_at, z, t, is_channel)
                sigmoid = tl.sigmoid(gate)
                out = tl.sum(h * C_t, 0)
                if D is not None:
                    out += D_row * x
                dgate = dout * out * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                _store(dz_at, dz, t, dgate, is_channel)
                dout *= gate * sigmoid
            row = (first_row + t) * states + n
            g += dout[None, :] * C_t
            tl.store(dC + row, tl.sum(dout[None, :] * h, 1), is_state)
            tl.store(dB + row, tl.sum((step * x)[None, :] * g, 1), is_state)
            dinput = tl.sum(g * B_t, 0)
            h = h_before[i]
            g *= tl.exp2(step[None, :] * A_tile)
            dlog = g * h
            dA_sum += dlog * step[None, :]
            dstep = tl.sum(dlog * A_tile, 0) / LOG2E + dinput * x
            if SOFTPLUS:
                dstep *= tl.sigmoid(raw)
            dx = dinput * step
            if D is not None:
                dx += dout * D_row
                dD_sum += dout * x
            if delta_bias is not None:
                dbias_sum += dstep
            _store(du_at, du, t, dx, is_channel)
            _store(ddelta_at, ddelta, t, dstep, is_channel)

    tl.store(dA + _offsets(b, d, n, channels, states), dA_sum, in_tile)
    sequence = b.to(tl.int64) * channels
    if D is not None:
        tl.store(dD + sequence + d, dD_sum, d < channels)
    if delta_bias is not None:
        tl.store(dbias + sequence + d, dbias_sum, d < channels)
