"""One position of the convolution for every sequence, in one kernel."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def step_kernel(
    state,
    x,
    weight,
    bias,
    y,
    new_state,
    channels,
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
    PDL: tl.constexpr,
):
    """Program (b, c): CHANNELS channels of sequence b. y and new_state are contiguous, all else has strides.

    new_state may be state itself: a thread has read all of its channels' taps before it writes the first.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    row = channel < channels

    # All loads before the first store: they would wait for it, as it might change what they read.
    newest = tl.load(x + sequence * x_batch + channel * x_channel, mask=row, other=0.0)
    values, taps = (), ()
    for tap in tl.static_range(WIDTH - 1):
        place = state + sequence * state_batch + tap * state_tap + channel * state_channel
        values += (tl.load(place, mask=row, other=0.0),)  # type: ignore[assignment]
    for tap in tl.static_range(WIDTH):
        place = weight + channel * weight_channel + tap * weight_tap
        taps += (tl.load(place, mask=row, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    if bias is not None:
        out = tl.load(bias + channel, mask=row, other=0.0).to(tl.float32)
    else:
        out = tl.zeros((CHANNELS,), tl.float32)

    for tap in tl.static_range(WIDTH - 1):
        out += values[tap].to(tl.float32) * taps[tap]
    out += newest.to(tl.float32) * taps[WIDTH - 1]
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(y + sequence * channels + channel, out.to(y.dtype.element_ty), mask=row)

    new_state += sequence * (WIDTH - 1) * channels + channel
    for tap in tl.static_range(1, WIDTH - 1):
        tl.store(new_state + (tap - 1) * channels, values[tap], mask=row)
    if WIDTH > 1:
        tl.store(new_state + (WIDTH - 2) * channels, newest.to(new_state.dtype.element_ty), mask=row)
