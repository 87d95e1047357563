"""The causal convolution in Triton: the kernels. `launch.py` launches them, docs/kernels.md explains them.

A thread owns some channels and walks through time with the last inputs in registers: every input is read once, and no
thread needs anything of another. A program owns BLOCK channels and one or several stretches of one sequence, which
follow one another: (stretch, channel) are then the axes of what it computes with, and a warp has one stretch.
The backward is in `triton_backward.py`.
"""

# Tuples of Triton know "+" and not "*", and grow in its unrolled loops:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import sigmoid


@triton.jit
def document(seq_idx, t, seq_row, length):
    """The number of the document at position t, or of the first or last one: no document begins outside."""
    return tl.load(seq_idx + tl.minimum(tl.maximum(t, 0), length - 1) * seq_row)


@triton.jit
def grow(age, number, seq_idx, t, seq_row, length):
    """The steps since the document of position t began, and its number; from those of t - 1."""
    here = document(seq_idx, t, seq_row, length)
    return tl.where(here == number, age + 1, 0), here


@triton.jit
def age_before(seq_idx, start, seq_row, length, WIDTH: tl.constexpr):
    """`grow` of the position before `start`, as if the document began no earlier than the first input that is read."""
    age, number = 0 * start, document(seq_idx, start - (WIDTH - 1), seq_row, length)
    for lag in tl.static_range(WIDTH - 2, 0, -1):
        age, number = grow(age, number, seq_idx, start - lag, seq_row, length)
    return age, number


@triton.jit
def _row(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_before(x, initial_state, t, x_row, channels, c, is_channel, WIDTH: tl.constexpr):
    """The input at a position of x, or of the initial state where t < 0."""
    row = _row(x + t * x_row + c, is_channel & (t >= 0))
    if initial_state is not None:
        row += _row(initial_state + (t + WIDTH - 1) * channels + c, is_channel & (t < 0))
    return row


@triton.jit
def _taps(weight, c, is_channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The filters by lag: the first multiplies the input of the same position. Read side by side, then taken apart."""
    PADDED: tl.constexpr = 2 if WIDTH == 2 else 4
    tap = tl.arange(0, PADDED)
    is_tap = is_channel[:, None]
    if PADDED != WIDTH:
        is_tap = is_tap & (tap < WIDTH)
    filters = tl.load(weight + c[:, None] * WIDTH + tap, mask=is_tap, other=0.0).to(tl.float32)
    if WIDTH == 2:
        first, second = tl.split(filters)
        taps = (second, first)
    else:
        even, odd = tl.split(filters.reshape(BLOCK, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        taps = (third, second, first)
        if WIDTH == 4:
            taps = (fourth, third, second, first)
    return taps


@triton.jit
def before_activation(rows, now: tl.constexpr, taps, bias, age, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """bias + sum of taps[lag] · rows[now - lag], without the lags that a document's beginning hides."""
    total = bias + taps[0] * rows[now]
    for lag in tl.static_range(1, WIDTH):
        row = rows[now - lag]
        if PACKED:
            row = tl.where(age >= lag, row, 0.0)
        total += taps[lag] * row
    return total


@triton.jit
def filters(weight, bias, c, is_channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRETCHES: tl.constexpr):
    """The taps by lag, and the bias or zeros; each (channel), or (1, channel) for several stretches."""
    taps = _taps(weight, c, is_channel, WIDTH, BLOCK)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)
    if STRETCHES > 1:
        rows = ()
        for lag in tl.static_range(WIDTH):
            rows = rows + (taps[lag][None, :],)
        taps, offset = rows, offset[None, :]
    return taps, offset


@triton.jit
def rows_ahead(pointers, row, t, length, is_column, COUNT: tl.constexpr):
    """What a tensor has at positions from t on, asked for and not yet looked at; zeros beyond the end."""
    rows = ()
    for u in tl.static_range(COUNT):
        rows = rows + (tl.load(pointers + u * row, mask=is_column & (t + u < length), other=0.0),)
    return rows


@triton.jit
def place(channels, chunks, positions, BLOCK: tl.constexpr):
    """Of this program: its number along batch and time, its sequence, its first position, and its channels."""
    groups = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    chunk = pid // groups
    return chunk, (chunk // chunks).to(tl.int64), chunk % chunks * positions, pid % groups * BLOCK + tl.arange(0, BLOCK)


@triton.jit(
    do_not_specialize=[
        *("x_batch", "x_row", "seq_batch", "seq_row", "length", "channels", "chunks"),
    ]
)
def forward_kernel(
    x,
    weight,
    bias,
    seq_idx,
    initial_state,
    y,
    final_state,
    x_batch,
    x_row,
    seq_batch,
    seq_row,
    length,
    channels,
    chunks,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """y of STEPS positions of each stretch, and by the last program of a sequence the final state.

    channels and the strides of x are given in units of ALIGN, which tells the compiler how wide its loads may be.
    """
    PACKED: tl.constexpr = seq_idx is not None
    LEFT: tl.constexpr = WIDTH - 1
    channels = channels * ALIGN
    _, batch, first, c = place(channels, chunks, STEPS * STRETCHES, BLOCK)
    is_channel = c < channels
    start, column, is_column = first + tl.arange(0, STRETCHES)[:, None] * STEPS, c[None, :], is_channel[None, :]
    x += batch * x_batch * ALIGN
    x_row = x_row.to(tl.int64) * ALIGN
    y_row = channels.to(tl.int64)
    x_here = x + start * x_row + column
    y_here = y + (batch * length + start) * y_row + column
    if PACKED:
        seq_idx += batch * seq_batch
        seq_row = seq_row.to(tl.int64)
    if initial_state is not None:
        initial_state += batch * LEFT * channels

    if PDL:
        gdc_wait()
    rows = ()  # everything is asked for before anything is looked at: the filters last, which all warps share
    for lag in tl.static_range(LEFT, 0, -1):
        is_there = is_column & (start - lag < length)
        rows = rows + (row_before(x, initial_state, start - lag, x_row, channels, column, is_there, WIDTH),)
    rows = rows + rows_ahead(x_here, x_row, start, length, is_column, STEPS)
    age = LEFT
    if PACKED:
        age, number = age_before(seq_idx, start, seq_row, length, WIDTH)
    ages = ()
    for u in tl.static_range(STEPS):
        if PACKED:
            age, number = grow(age, number, seq_idx, start + u, seq_row, length)
        ages = ages + (age,)
    taps, offset = filters(weight, bias, c, is_channel, WIDTH, BLOCK, STRETCHES)
    for u in tl.static_range(STEPS):
        value = before_activation(rows, LEFT + u, taps, offset, ages[u], WIDTH, PACKED)
        if SILU:
            value = value * sigmoid(value)
        tl.store(y_here + u * y_row, value.to(y.dtype.element_ty), mask=is_column & (start + u < length))

    if first + STEPS * STRETCHES >= length:
        final_state += batch * LEFT * channels
        for lag in tl.static_range(LEFT, 0, -1):
            t = length - lag
            row = row_before(x, initial_state, t, x_row, channels, c, is_channel, WIDTH)
            if PACKED:
                for later in tl.static_range(1, lag):
                    here = document(seq_idx, t + later, seq_row, length)
                    row = tl.where(here == document(seq_idx, t + later - 1, seq_row, length), row, 0.0)
            target = final_state + (LEFT - lag) * channels + c
            tl.store(target, row.to(final_state.dtype.element_ty), mask=is_channel)
    if PDL:  # after the wait: the kernel after this one may rely on all those before this one having ended
        gdc_launch_dependents()
