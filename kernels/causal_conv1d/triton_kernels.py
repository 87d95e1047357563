"""The causal convolution in Triton: the kernels. `launch.py` launches them, docs/kernels.md explains them.

A thread owns some channels and walks through time with the last inputs in registers: every input is read once, and no
thread needs anything of another. A program owns BLOCK channels and a stretch of one sequence.
"""

# Tuples of Triton know "+" and not "*", and grow in its unrolled loops:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import sigmoid


@triton.jit
def _document(seq_idx, t, seq_row, length):
    """The number of the document at position t, or of the first or last one: no document begins outside."""
    return tl.load(seq_idx + tl.minimum(tl.maximum(t, 0), length - 1) * seq_row)


@triton.jit
def _grow(age, document, seq_idx, t, seq_row, length):
    """The steps since the document of position t began, and its number; from those of t - 1."""
    here = _document(seq_idx, t, seq_row, length)
    return tl.where(here == document, age + 1, 0), here


@triton.jit
def _row(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_before(x, initial_state, t, x_row, channels, c, is_channel, WIDTH: tl.constexpr):
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
def _before_activation(rows, now: tl.constexpr, taps, bias, age, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """bias + sum of taps[lag] · rows[now - lag], without the lags that a document's beginning hides."""
    total = bias + taps[0] * rows[now]
    for lag in tl.static_range(1, WIDTH):
        row = rows[now - lag]
        if PACKED:
            row = tl.where(age >= lag, row, 0.0)
        total += taps[lag] * row
    return total


@triton.jit
def _filters(weight, bias, c, is_channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """The taps by lag, and the bias or zeros; each of channels, or of one row of them for several stretches."""
    taps = _taps(weight, c, is_channel, WIDTH, BLOCK)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)
    if not FLAT:
        rows = ()
        for lag in tl.static_range(WIDTH):
            rows = rows + (taps[lag][None, :],)
        taps, offset = rows, offset[None, :]
    return taps, offset


@triton.jit
def _place(pid, channels, chunks, steps, BLOCK: tl.constexpr, STRETCHES: tl.constexpr):
    """The number of a program's chunk, its sequence, its first position, those of its stretches, and its channels."""
    groups = tl.cdiv(channels, BLOCK)
    chunk = pid // groups
    first = chunk % chunks * (steps * STRETCHES)
    return chunk, (chunk // chunks).to(tl.int64), first, pid % groups * BLOCK + tl.arange(0, BLOCK)


@triton.jit(
    do_not_specialize=[
        *("x_batch", "x_row", "seq_batch", "seq_row", "length", "channels", "chunks", "steps"),
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
    steps,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    UNROLL: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y of `steps` positions of each stretch, and by the last program of a sequence the final state.

    steps: a multiple of UNROLL; ONCE: equal to it. channels and the strides of x are given in units of ALIGN, which
    tells the compiler how wide its loads may be.
    """
    PACKED: tl.constexpr = seq_idx is not None
    FLAT: tl.constexpr = STRETCHES == 1 and not ONCE
    channels = channels * ALIGN
    _, batch, first, c = _place(tl.program_id(0), channels, chunks, steps, BLOCK, STRETCHES)
    is_channel = c < channels
    x += batch * x_batch * ALIGN
    x_row = x_row.to(tl.int64) * ALIGN
    y_row = channels.to(tl.int64)
    y += batch * length * y_row
    if PACKED:
        seq_idx += batch * seq_batch
        seq_row = seq_row.to(tl.int64)
    if initial_state is not None:
        initial_state += batch * (WIDTH - 1) * channels
    start, column, is_column = first, c, is_channel
    if not FLAT:
        start += tl.arange(0, STRETCHES)[:, None] * steps
        column, is_column = c[None, :], is_channel[None, :]
    x_here, y_here = x + start * x_row + column, y + start * y_row + column

    if PDL:  # in this order: the kernel after this one may rely on all those before this one having ended
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    history = ()  # the inputs before this position, oldest first
    for lag in tl.static_range(WIDTH - 1, 0, -1):
        is_there = is_column & (start - lag < length)
        history = history + (_row_before(x, initial_state, start - lag, x_row, channels, column, is_there, WIDTH),)
    ahead = ()
    if ONCE:
        for u in tl.static_range(UNROLL):
            ahead = ahead + (tl.load(x_here + u * x_row, mask=is_column & (start + u < length), other=0.0),)
    age = WIDTH - 1
    if PACKED:  # steps since the document began; it may as well have begun with the first input that is read
        age, document = 0 * start, _document(seq_idx, start - (WIDTH - 1), seq_row, length)
        for lag in tl.static_range(WIDTH - 2, 0, -1):
            age, document = _grow(age, document, seq_idx, start - lag, seq_row, length)
    taps, offset = _filters(weight, bias, c, is_channel, WIDTH, BLOCK, FLAT)

    for n in range(0, UNROLL if ONCE else min(steps, length - first), UNROLL):
        t = start + n
        rows = history
        ages = ()
        for u in tl.static_range(UNROLL):
            if ONCE:
                rows = rows + (ahead[u].to(tl.float32),)
            else:
                rows = rows + (_row(x_here + u * x_row, is_column & (t + u < length)),)
            if PACKED:
                age, document = _grow(age, document, seq_idx, t + u, seq_row, length)
            ages = ages + (age,)
        for u in tl.static_range(UNROLL):
            value = _before_activation(rows, WIDTH - 1 + u, taps, offset, ages[u], WIDTH, PACKED)
            if SILU:
                value = value * sigmoid(value)
            tl.store(y_here + u * y_row, value.to(y.dtype.element_ty), mask=is_column & (t + u < length))
        history = rows[UNROLL:]
        x_here += UNROLL * x_row
        y_here += UNROLL * y_row

    if first + steps * STRETCHES >= length:
        final_state += batch * (WIDTH - 1) * channels
        for lag in tl.static_range(WIDTH - 1, 0, -1):
            t = length - lag
            row = _row_before(x, initial_state, t, x_row, channels, c, is_channel, WIDTH)
            if PACKED:
                for later in tl.static_range(1, lag):
                    here = _document(seq_idx, t + later, seq_row, length)
                    row = tl.where(here == _document(seq_idx, t + later - 1, seq_row, length), row, 0.0)
            target = final_state + (WIDTH - 1 - lag) * channels + c
            tl.store(target, row.to(final_state.dtype.element_ty), mask=is_channel)
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def _add_each(a, b, c, d, e, a2, b2, c2, d2, e2):
    return a + a2, b + b2, c + c2, d + d2, e + e2


@triton.jit
def _rows_ahead(pointers, row, t, length, is_column, COUNT: tl.constexpr):
    """What a tensor has at positions from t on, asked for and not yet looked at; zeros beyond the end."""
    rows = ()
    for u in tl.static_range(COUNT):
        rows = rows + (tl.load(pointers + u * row, mask=is_column & (t + u < length), other=0.0),)
    return rows


@triton.jit
def _output_gradient(
    rows, now: tl.constexpr, grad, taps, offset, age, WIDTH: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr
):
    """The gradient of the value before the activation: silu' = gate + gate · (value - value · gate)."""
    if SILU:
        value = _before_activation(rows, now, taps, offset, age, WIDTH, PACKED)
        gate = sigmoid(value)
        grad = grad * gate
        grad += grad * (value - value * gate)
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
            with_this = with_this + (pending[WIDTH - 1 - lag] + taps[lag] * by_lag,)
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
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    UNROLL: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """x_grad of `steps` positions of each stretch, and this program's part of the gradients of weight and bias.

    The gradient of a position is complete WIDTH-1 positions later: after its own ones the walk goes that far into those
    of the next stretch, and past the end, where the final state stands for what would have read them. `pending` holds
    the incomplete ones. more: a second summand of the gradient of y, contiguous. parts: (program, WIDTH by lag from the
    longest, then the bias, channel), fp32. steps, ONCE: as in the forward.
    """
    PACKED: tl.constexpr = seq_idx is not None
    FLAT: tl.constexpr = STRETCHES == 1 and not ONCE
    KINDS: tl.constexpr = WIDTH + (bias is not None)
    LEFT: tl.constexpr = WIDTH - 1
    owned = steps - LEFT
    channels = channels * ALIGN
    chunk, batch, first, c = _place(tl.program_id(0), channels, chunks, owned, BLOCK, STRETCHES)
    is_channel = c < channels
    x += batch * x_batch * ALIGN
    x_row = x_row.to(tl.int64) * ALIGN
    y_grad += batch * grad_batch * ALIGN
    grad_row = grad_row.to(tl.int64) * ALIGN
    out_row = out_row.to(tl.int64) * ALIGN
    x_grad += batch * out_batch * ALIGN
    more_row = channels.to(tl.int64)
    part_here = parts
    parts += chunk.to(tl.int64) * KINDS * channels + c
    if PACKED:
        seq_idx += batch * seq_batch
        seq_row = seq_row.to(tl.int64)
    if initial_state is not None:
        initial_state += batch * LEFT * channels
        state_grad += batch * LEFT * channels
    if final_grad is not None:
        final_grad += batch * LEFT * channels
    start, column, is_column = first, c, is_channel
    zeros = tl.zeros([BLOCK], tl.float32)
    if not FLAT:
        start += tl.arange(0, STRETCHES)[:, None] * owned
        column, is_column = c[None, :], is_channel[None, :]
        zeros = tl.zeros([STRETCHES, BLOCK], tl.float32)
    stop = tl.minimum(start + owned, length)
    read_stop = tl.minimum(stop + LEFT, length)
    x_here, y_grad_here = x + start * x_row + column, y_grad + start * grad_row + column
    x_grad_here = x_grad + (start - LEFT) * out_row + column
    if more is not None:
        more_here = more + (batch * length + start) * more_row + column

    if PDL:  # as in the forward
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    history = ()
    pending = ()
    for lag in tl.static_range(LEFT, 0, -1):
        is_there = is_column & (start - lag < length)
        history = history + (_row_before(x, initial_state, start - lag, x_row, channels, column, is_there, WIDTH),)
        pending = pending + (zeros,)
    x_ahead = _rows_ahead(x_here, x_row, start, read_stop, is_column, UNROLL)
    y_grad_ahead = _rows_ahead(y_grad_here, grad_row, start, read_stop, is_column, UNROLL)
    if more is not None:
        more_ahead = _rows_ahead(more_here, more_row, start, read_stop, is_column, UNROLL)
    age = LEFT
    if PACKED:
        age, document = 0 * start, _document(seq_idx, start - LEFT, seq_row, length)
        for lag in tl.static_range(LEFT - 1, 0, -1):
            age, document = _grow(age, document, seq_idx, start - lag, seq_row, length)
    taps, offset = _filters(weight, bias, c, is_channel, WIDTH, BLOCK, FLAT)
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
                age, document = _grow(age, document, seq_idx, t0 + u, seq_row, length)
            ages = ages + (age,)
        if not ONCE:  # what the next round reads is asked for before this one computes
            x_here += UNROLL * x_row
            y_grad_here += UNROLL * grad_row
            x_ahead = _rows_ahead(x_here, x_row, t0 + UNROLL, read_stop, is_column, UNROLL)
            y_grad_ahead = _rows_ahead(y_grad_here, grad_row, t0 + UNROLL, read_stop, is_column, UNROLL)
            if more is not None:
                more_here += UNROLL * more_row
                more_ahead = _rows_ahead(more_here, more_row, t0 + UNROLL, read_stop, is_column, UNROLL)
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
    target, is_target = parts, is_channel
    if not FLAT:
        if REDUCE:
            for _ in tl.static_range(5 - KINDS):
                sums = sums + (zeros,)
            sums = tl.reduce(sums, 0, _add_each)
        else:
            stretch = tl.arange(0, STRETCHES)[:, None].to(tl.int64)
            target = part_here + (chunk.to(tl.int64) * STRETCHES + stretch) * KINDS * channels + column
            is_target = is_column
    for kind in tl.static_range(KINDS):
        tl.store(target + kind * channels, sums[kind], mask=is_target)
    if PDL == 2:
        gdc_launch_dependents()
