"""The causal convolution's backward in Triton; see `triton_kernels.py`."""

# Tuples of Triton know "+" and not "*", and grow in its unrolled loops:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.causal_conv1d.triton_kernels import (
    age_before,
    before_activation,
    filters,
    grow,
    place,
    row_before,
    rows_ahead,
)
from kernels.triton_math import sigmoid


@triton.jit
def _output_gradient(
    rows, now: tl.constexpr, grad, taps, offset, age, WIDTH: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr
):
    """The gradient of the value before the activation: silu' = gate + gate · (value - value · gate).

    Here and below `fma` says which product is rounded with the sum: where there are two, the compiler may take another
    one in each step of an unrolled loop, and the bits would depend on where a stretch begins.
    """
    if SILU:
        value = before_activation(rows, now, taps, offset, age, WIDTH, PACKED)
        gate = sigmoid(value)
        grad = grad * gate
        grad = tl.fma(grad, value - value * gate, grad)
    return grad


@triton.jit
def _reach_back(pending, grad, taps, age, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """The gradients of the last WIDTH inputs, oldest first, with this one's; pending: of the WIDTH - 1 before it."""
    with_this = ()
    for lag in tl.static_range(WIDTH - 1, -1, -1):
        by_lag = grad
        if PACKED:
            by_lag = tl.where(age >= lag, grad, 0.0)
        if lag == 0:
            with_this = with_this + (taps[0] * by_lag,)
        else:
            with_this = with_this + (tl.fma(taps[lag], by_lag, pending[WIDTH - 1 - lag]),)
    return with_this


@triton.jit
def _end_gradient(final_grad, t, length, channels, column, is_column, age, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """What the final state adds to the gradient that is complete at position t, past the end."""
    is_end = (t >= length) & (t < length + WIDTH - 1)
    if PACKED:
        is_end = is_end & (age >= WIDTH - 1)
    return tl.load(final_grad + (t - length) * channels + column, mask=is_column & is_end, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        *("grad_batch", "grad_row", "x_batch", "x_row", "out_batch", "out_row"),
        *("seq_batch", "seq_row", "length", "channels", "chunks", "steps"),
    ]
)
def backward_kernel(
    y_grad,
    more,
    final_grad,
    x,
    weight,
    bias,
    seq_idx,
    initial_state,
    x_grad,
    state_grad,
    parts,
    grad_batch,
    grad_row,
    x_batch,
    x_row,
    out_batch,
    out_row,
    seq_batch,
    seq_row,
    length,
    channels,
    chunks,
    steps,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """x_grad of `steps` - (WIDTH-1) positions of each stretch, and its part of the gradients of weight and bias.

    The gradient of a position is complete WIDTH-1 positions later: the walk goes that far into the next stretch, and
    past the end, where the final state stands for what would have read them. `pending` holds the incomplete ones.
    more: a second summand of the gradient of y, contiguous. parts: (stretch, WIDTH by lag from the longest, then the
    bias, channel), fp32. steps: a multiple of UNROLL; where a program has several stretches it is UNROLL, so that all
    inputs are asked for at once and most conditions are known to the compiler.
    """
    PACKED: tl.constexpr = seq_idx is not None
    ONCE: tl.constexpr = STRETCHES > 1
    KINDS: tl.constexpr = WIDTH + (bias is not None)
    LEFT: tl.constexpr = WIDTH - 1
    owned = steps - LEFT
    channels = channels * ALIGN
    chunk, batch, first, c = place(channels, chunks, owned * STRETCHES, BLOCK)
    is_channel = c < channels
    x += batch * x_batch * ALIGN
    x_row = x_row.to(tl.int64) * ALIGN
    y_grad += batch * grad_batch * ALIGN
    grad_row = grad_row.to(tl.int64) * ALIGN
    out_row = out_row.to(tl.int64) * ALIGN
    x_grad += batch * out_batch * ALIGN
    more_row = channels.to(tl.int64)
    if PACKED:
        seq_idx += batch * seq_batch
        seq_row = seq_row.to(tl.int64)
    if initial_state is not None:
        initial_state += batch * LEFT * channels
        state_grad += batch * LEFT * channels
    if final_grad is not None:
        final_grad += batch * LEFT * channels
    start, column, is_column = first, c, is_channel
    part = chunk.to(tl.int64)
    zeros = tl.zeros([BLOCK], tl.float32)
    if ONCE:
        stretch = tl.arange(0, STRETCHES)[:, None]
        start += stretch * owned
        part = part * STRETCHES + stretch
        column, is_column = c[None, :], is_channel[None, :]
        zeros = tl.zeros([STRETCHES, BLOCK], tl.float32)
    stop = tl.minimum(start + owned, length)
    read_stop = tl.minimum(stop + LEFT, length)
    x_here, y_grad_here = x + start * x_row + column, y_grad + start * grad_row + column
    x_grad_here = x_grad + (start - LEFT) * out_row + column
    if more is not None:
        more_here = more + (batch * length + start) * more_row + column

    if PDL:
        gdc_wait()
    history = ()
    pending = ()
    for lag in tl.static_range(LEFT, 0, -1):
        is_there = is_column & (start - lag < length)
        history = history + (row_before(x, initial_state, start - lag, x_row, channels, column, is_there, WIDTH),)
        pending = pending + (zeros,)
    x_ahead = rows_ahead(x_here, x_row, start, read_stop, is_column, UNROLL)
    y_grad_ahead = rows_ahead(y_grad_here, grad_row, start, read_stop, is_column, UNROLL)
    if more is not None:
        more_ahead = rows_ahead(more_here, more_row, start, read_stop, is_column, UNROLL)
    age = LEFT
    if PACKED:
        age, number = age_before(seq_idx, start, seq_row, length, WIDTH)
    taps, offset = filters(weight, bias, c, is_channel, WIDTH, BLOCK, STRETCHES)
    weight_sums = pending + (zeros,)  # by lag
    bias_sum = zeros

    for n in range(0, UNROLL if ONCE else min(owned, length - first) + LEFT, UNROLL):
        t0 = start + n
        rows = history
        grads = ()
        ages = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (x_ahead[u].to(tl.float32),)
            grad = y_grad_ahead[u].to(tl.float32)
            if more is not None:
                grad += more_ahead[u].to(tl.float32)
            grads = grads + (grad,)
            if PACKED:
                age, number = grow(age, number, seq_idx, t0 + u, seq_row, length)
            ages = ages + (age,)
        if not ONCE:  # what the next round reads is asked for before this one computes
            x_here += UNROLL * x_row
            y_grad_here += UNROLL * grad_row
            x_ahead = rows_ahead(x_here, x_row, t0 + UNROLL, read_stop, is_column, UNROLL)
            y_grad_ahead = rows_ahead(y_grad_here, grad_row, t0 + UNROLL, read_stop, is_column, UNROLL)
            if more is not None:
                more_here += UNROLL * more_row
                more_ahead = rows_ahead(more_here, more_row, t0 + UNROLL, read_stop, is_column, UNROLL)
        for u in tl.static_range(UNROLL):
            t = t0 + u
            grad = _output_gradient(rows, LEFT + u, grads[u], taps, offset, ages[u], WIDTH, SILU, PACKED)
            if not ONCE or u < UNROLL - LEFT:  # of its own positions; beyond the end it is 0
                own = grad if ONCE else tl.where(t < stop, grad, 0.0)
                bias_sum += own
                sums = ()
                for lag in tl.static_range(WIDTH):
                    row = rows[LEFT + u - lag]
                    if PACKED:
                        row = tl.where(ages[u] >= lag, row, 0.0)
                    sums = sums + (weight_sums[lag] + own * row,)
                weight_sums = sums
            with_this = _reach_back(pending, grad, taps, ages[u], WIDTH, PACKED)
            complete = with_this[0]
            pending = with_this[1:]
            if final_grad is not None:
                complete += _end_gradient(final_grad, t, length, channels, column, is_column, ages[u], WIDTH, PACKED)
            position = t - LEFT
            if not ONCE or u >= LEFT:
                mask = is_column & (position < stop)
                if not ONCE:
                    mask = mask & (position >= start)
                tl.store(x_grad_here + u * out_row, complete.to(x_grad.dtype.element_ty), mask=mask)
            if initial_state is not None and (not ONCE or u < LEFT):
                target = state_grad + t * channels + column
                tl.store(target, complete.to(state_grad.dtype.element_ty), mask=is_column & (position < 0))
        history = rows[UNROLL:]
        x_grad_here += UNROLL * out_row

    sums = weight_sums[::-1]
    if bias is not None:
        sums = sums + (bias_sum,)
    parts += part * KINDS * channels + column
    for kind in tl.static_range(KINDS):
        tl.store(parts + kind * channels, sums[kind], mask=is_column)
    if PDL:  # as in the forward
        gdc_launch_dependents()
