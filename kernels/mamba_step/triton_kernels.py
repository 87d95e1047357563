"""A decoded token of Mamba-1 in two kernels, cut where all channels have to meet: at the projection to Δ, B and C.

The first convolves a share of the channels and multiplies it with its columns of the projection; what the shares sum to
is found by each program of the second, which has a few hundred numbers to sum up for that, but no launch to wait for.
Between the two everything is rounded where separate operators would round it.
"""

import triton
import triton.language as tl

from kernels.triton_math import softplus


@triton.jit
def project_kernel(
    state,
    x,
    conv_weight,
    conv_bias,
    weight,
    mixed,
    parts,
    channels,
    outputs,
    x_batch,
    x_channel,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Program (b, s): CHANNELS channels of sequence b, and what they add to its projection.

    state (batch, WIDTH - 1, channel) is overwritten; conv_weight (channel, WIDTH), weight (outputs, channel), mixed
    (batch, channel) and parts (batch, s, outputs) are contiguous.
    """
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = split * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)
    column, row = channel < channels, output < outputs

    # All loads before the first store: they would wait for it, as it might change what they read.
    newest = tl.load(x + sequence * x_batch + channel * x_channel, mask=column, other=0.0)
    matrix = tl.load(
        weight + output[:, None] * channels + channel[None, :], mask=row[:, None] & column[None, :], other=0.0
    )
    state += sequence * (WIDTH - 1) * channels + channel
    values, taps = (), ()
    for tap in tl.static_range(WIDTH - 1):
        values += (tl.load(state + tap * channels, mask=column, other=0.0),)  # type: ignore[assignment]
    for tap in tl.static_range(WIDTH):
        place = conv_weight + channel * WIDTH + tap
        taps += (tl.load(place, mask=column, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    out = tl.load(conv_bias + channel, mask=column, other=0.0).to(tl.float32)

    for tap in tl.static_range(WIDTH - 1):
        out += values[tap].to(tl.float32) * taps[tap]
    out += newest.to(tl.float32) * taps[WIDTH - 1]
    rounded = (out / (1.0 + tl.exp(-out))).to(mixed.dtype.element_ty)
    part = tl.sum(matrix.to(tl.float32) * rounded.to(tl.float32)[None, :], axis=1)

    # The same few channels are loaded by several warps, of which one may still be on its way when another one stores.
    tl.debug_barrier()
    tl.store(mixed + sequence * channels + channel, rounded, mask=column)
    tl.store(parts + (sequence * tl.num_programs(1) + split) * outputs + output, part, mask=row)
    for tap in tl.static_range(1, WIDTH - 1):
        tl.store(state + (tap - 1) * channels, values[tap], mask=column)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * channels, newest.to(state.dtype.element_ty), mask=column)


@triton.jit
def _sum_of_parts(parts, first, count, splits, outputs, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Outputs [first, first + count) of the projection, fp32 (SIZE,); zeros beyond."""
    split, output = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    mask = (split < splits)[:, None] & (output < count)[None, :]
    return tl.sum(tl.load(parts + split[:, None] * outputs + first + output[None, :], mask=mask, other=0.0), axis=0)


@triton.jit
def scan_kernel(
    state,
    x,
    z,
    parts,
    dt_weight,
    dt_bias,
    A_log,
    D,
    y,
    channels,
    rank,
    states,
    splits,
    z_batch,
    z_channel,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (b, c): CHANNELS channels of the state of sequence b. All but z is contiguous; state is overwritten."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, k = tl.arange(0, STATES), tl.arange(0, RANK)
    row, column = channel < channels, n < states
    both = row[:, None] & column[None, :]
    place = state + sequence * channels * states + channel[:, None] * states + n[None, :]
    place_of_y = sequence * channels + channel
    outputs = rank + 2 * states
    parts += sequence * splits * outputs

    # All loads before the arithmetic: most of the time goes by while they are on their way.
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log + channel[:, None] * states + n[None, :], mask=both, other=0.0).to(tl.float32))
    rows_of_dt = tl.load(
        dt_weight + channel[:, None] * rank + k[None, :], mask=row[:, None] & (k < rank)[None, :], other=0.0
    )
    value = tl.load(x + place_of_y, mask=row, other=0.0).to(tl.float32)
    gate = tl.load(z + sequence * z_batch + channel * z_channel, mask=row, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=row, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=row, other=0.0).to(tl.float32)
    low = _sum_of_parts(parts, 0, rank, splits, outputs, RANK, SPLITS)
    read = _sum_of_parts(parts, rank, states, splits, outputs, STATES, SPLITS)
    written = _sum_of_parts(parts, rank + states, states, splits, outputs, STATES, SPLITS)

    low = low.to(y.dtype.element_ty).to(tl.float32)
    read = read.to(y.dtype.element_ty).to(tl.float32)
    written = written.to(y.dtype.element_ty).to(tl.float32)
    delta = tl.sum(rows_of_dt.to(tl.float32) * low[None, :], axis=1)
    delta = softplus(delta.to(y.dtype.element_ty).to(tl.float32) + bias)
    h = tl.exp(delta[:, None] * rate) * h + (delta * value)[:, None] * read[None, :]
    out = (tl.sum(h * written[None, :], axis=1) + skip * value) * (gate / (1.0 + tl.exp(-gate)))
    tl.debug_barrier()  # as above, where there are few states
    tl.store(place, h.to(state.dtype.element_ty), mask=both)
    tl.store(y + place_of_y, out.to(y.dtype.element_ty), mask=row)
