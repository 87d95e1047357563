"""One position of SSD for every sequence, in one kernel: the state is read and written once."""

import triton
import triton.language as tl

from kernels.triton_math import softplus


@triton.jit
def step_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    y,
    new_state,
    heads,
    group_heads,
    head_dim,
    states,
    state_batch,
    state_head,
    state_channel,
    state_state,
    x_batch,
    x_head,
    x_channel,
    dt_batch,
    dt_head,
    B_batch,
    B_group,
    B_state,
    C_batch,
    C_group,
    C_state,
    z_batch,
    z_head,
    z_channel,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    WIDE_SKIP: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """Program (b · heads + h, c): CHANNELS channels of head h of sequence b. y and new_state are contiguous."""
    sequence, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    group = head // group_heads
    p = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    row, column = p < head_dim, n < states
    both = row[:, None] & column[None, :]

    # All loads before the arithmetic: most of the time goes by while they are on their way.
    place = state + sequence * state_batch + head * state_head + p[:, None] * state_channel + n[None, :] * state_state
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    delta = tl.load(dt + sequence * dt_batch + head * dt_head).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    value = tl.load(x + sequence * x_batch + head * x_head + p * x_channel, mask=row, other=0.0).to(tl.float32)
    written = tl.load(B + sequence * B_batch + group * B_group + n * B_state, mask=column, other=0.0).to(tl.float32)
    read = tl.load(C + sequence * C_batch + group * C_group + n * C_state, mask=column, other=0.0).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + head).to(tl.float32)
    if D is not None:
        if WIDE_SKIP:
            skip = tl.load(D + head * head_dim + p, mask=row, other=0.0).to(tl.float32) * value
        else:
            skip = tl.load(D + head).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + sequence * z_batch + head * z_head + p * z_channel, mask=row, other=0.0).to(tl.float32)

    if SOFTPLUS:
        delta = softplus(delta)
    delta = tl.minimum(tl.maximum(delta, dt_min), dt_max)
    h = tl.exp(delta * rate) * h + (delta * value)[:, None] * written[None, :]
    first = (sequence * heads + head) * head_dim
    tl.store(new_state + (first + p[:, None]) * states + n[None, :], h, mask=both)
    out = tl.sum(h * read[None, :], axis=1)
    if D is not None:
        out += skip
    if z is not None:
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + first + p, out.to(y.dtype.element_ty), mask=row)
