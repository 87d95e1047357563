"""One position of the convolution for every sequence, in one kernel."""

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    state,
    x,
    weight,
    bias,
    y,
    new_state,
    channels,
    blocks,
    state_batch,
    state_tap,
    state_channel,
    x_batch,
    x_channel,
    weight_channel,
    weight_tap,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program p: CHANNELS channels of sequence p // blocks. y and new_state are contiguous, all else has strides."""
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    row = channel < channels
    new_state += sequence * (WIDTH - 1) * channels + channel

    newest = tl.load(x + sequence * x_batch + channel * x_channel, mask=row, other=0.0)
    taps = weight + channel * weight_channel
    out = newest.to(tl.float32) * tl.load(taps + (WIDTH - 1) * weight_tap, mask=row, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        place = state + sequence * state_batch + tap * state_tap + channel * state_channel
        value = tl.load(place, mask=row, other=0.0)
        out += value.to(tl.float32) * tl.load(taps + tap * weight_tap, mask=row, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(new_state + (tap - 1) * channels, value, mask=row)
    if WIDTH > 1:
        tl.store(new_state + (WIDTH - 2) * channels, newest.to(new_state.dtype.element_ty), mask=row)
    if bias is not None:
        out += tl.load(bias + channel, mask=row, other=0.0).to(tl.float32)
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(y + sequence * channels + channel, out.to(y.dtype.element_ty), mask=row)
