"""One position of the selective scan for every sequence, in one kernel: the state is read and written once."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import narrowed, softplus


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
    channels,
    states,
    state_batch,
    state_channel,
    state_state,
    x_batch,
    x_channel,
    dt_batch,
    dt_channel,
    A_channel,
    A_state,
    B_batch,
    B_state,
    C_batch,
    C_state,
    z_batch,
    z_channel,
    SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, c): CHANNELS channels of sequence b. y and new_state are contiguous, all else has strides.

    new_state may be state itself: each element is read and written by the same thread, in this order.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    row, column = channel < channels, n < states
    both = row[:, None] & column[None, :]

    # All loads before the arithmetic: most of the time goes by while they are on their way.
    place = state + sequence * state_batch + channel[:, None] * state_channel + n[None, :] * state_state
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    rate = tl.load(A + channel[:, None] * A_channel + n[None, :] * A_state, mask=both, other=0.0).to(tl.float32)
    delta = tl.load(dt + sequence * dt_batch + channel * dt_channel, mask=row, other=0.0).to(tl.float32)
    value = tl.load(x + sequence * x_batch + channel * x_channel, mask=row, other=0.0).to(tl.float32)
    read = tl.load(B + sequence * B_batch + n * B_state, mask=column, other=0.0).to(tl.float32)
    written = tl.load(C + sequence * C_batch + n * C_state, mask=column, other=0.0).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + channel, mask=row, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=row, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + sequence * z_batch + channel * z_channel, mask=row, other=0.0).to(tl.float32)

    if A_IS_LOG:
        rate = -tl.exp(rate)
    if SOFTPLUS:
        delta = softplus(delta)
    h = tl.exp(delta[:, None] * rate) * h + (delta * value)[:, None] * read[None, :]
    tl.store(
        new_state + (sequence * channels + channel[:, None]) * states + n[None, :],
        narrowed(h, new_state.dtype.element_ty),
        mask=both,
    )
    out = tl.sum(h * written[None, :], axis=1)
    if D is not None:
        out += skip
    if z is not None:
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + sequence * channels + channel, out.to(y.dtype.element_ty), mask=row)
