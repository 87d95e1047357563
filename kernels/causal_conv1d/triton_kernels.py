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
def _begins_document(seq_idx, t, seq_row, length):
    """Whether position t begins another document than that of t-1."""
    is_inside = (t > 0) & (t < length)
    here = tl.load(seq_idx + t * seq_row, mask=is_inside, other=0)
    before = tl.load(seq_idx + (t - 1) * seq_row, mask=is_inside, other=0)
    return here != before


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
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """y of `steps` positions, and by the last program of a sequence the final state.

    steps: a multiple of UNROLL. channels and the strides of x are given in units of ALIGN, which tells the compiler how
    wide its loads may be.
    """
    if PDL:  # in this order: the kernel after this one may rely on all those before this one having ended
        gdc_wait()
        gdc_launch_dependents()
    PACKED: tl.constexpr = seq_idx is not None
    channels = channels * ALIGN
    groups = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    batch = (pid // groups // chunks).to(tl.int64)
    start = pid // groups % chunks * steps
    c = pid % groups * BLOCK + tl.arange(0, BLOCK)
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

    taps = _taps(weight, c, is_channel, WIDTH, BLOCK)
    offset = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)
    history = ()  # the inputs before this position, oldest first
    age = WIDTH - 1  # steps since the document began, or more than any lag
    for lag in tl.static_range(WIDTH - 1, 0, -1):
        history = history + (_row_before(x, initial_state, start - lag, x_row, channels, c, is_channel, WIDTH),)
        if PACKED:
            age = tl.where(_begins_document(seq_idx, start - lag, seq_row, length), 0, age + 1)

    x_here, y_here = x + start * x_row + c, y + start * y_row + c
    for t in range(start, min(start + steps, length), UNROLL):
        rows = history
        ages = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (_row(x_here + u * x_row, is_channel & (t + u < length)),)
            if PACKED:
                age = tl.where(_begins_document(seq_idx, t + u, seq_row, length), 0, age + 1)
            ages = ages + (age,)
        for u in tl.static_range(UNROLL):
            value = _before_activation(rows, WIDTH - 1 + u, taps, offset, ages[u], WIDTH, PACKED)
            if SILU:
                value = value * sigmoid(value)
            tl.store(y_here + u * y_row, value.to(y.dtype.element_ty), mask=is_channel & (t + u < length))
        history = rows[UNROLL:]
        x_here += UNROLL * x_row
        y_here += UNROLL * y_row

    if start + steps >= length:
        final_state += batch * (WIDTH - 1) * channels
        for lag in tl.static_range(WIDTH - 1, 0, -1):
            t = length - lag
            row = _row_before(x, initial_state, t, x_row, channels, c, is_channel, WIDTH)
            if PACKED:
                for later in tl.static_range(1, lag):
                    row = tl.where(_begins_document(seq_idx, t + later, seq_row, length), 0.0, row)
            target = final_state + (WIDTH - 1 - lag) * channels + c
            tl.store(target, row.to(final_state.dtype.element_ty), mask=is_channel)


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
    UNROLL: tl.constexpr,
):
    """x_grad of `steps` - (WIDTH-1) positions, and this program's part of the gradients of weight and bias.

    The gradient of a position is complete WIDTH-1 positions later: the walk goes that far into the next program's
    positions, and past the end, where the final state stands for what would have read them. `pending` holds the
    incomplete ones. more: a second summand of the gradient of y, contiguous. parts: (program, WIDTH by lag from the
    longest, then the bias, channel), fp32.
    """
    PACKED: tl.constexpr = seq_idx is not None
    owned = steps - (WIDTH - 1)
    KINDS: tl.constexpr = WIDTH + (bias is not None)
    channels = channels * ALIGN
    groups = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    batch = (pid // groups // chunks).to(tl.int64)
    start = pid // groups % chunks * owned
    stop = min(start + owned, length)
    c = pid % groups * BLOCK + tl.arange(0, BLOCK)
    is_channel = c < channels
    x += batch * x_batch * ALIGN
    x_row = x_row.to(tl.int64) * ALIGN
    y_grad += batch * grad_batch * ALIGN
    grad_row = grad_row.to(tl.int64) * ALIGN
    out_row = out_row.to(tl.int64) * ALIGN
    x_grad += batch * out_batch * ALIGN
    if PACKED:
        seq_idx += batch * seq_batch
        seq_row = seq_row.to(tl.int64)
    if initial_state is not None:
        initial_state += batch * (WIDTH - 1) * channels
        state_grad += batch * (WIDTH - 1) * channels
    if final_grad is not None:
        final_grad += batch * (WIDTH - 1) * channels

    zeros = tl.zeros([BLOCK], tl.float32)
    taps = _taps(weight, c, is_channel, WIDTH, BLOCK)
    offset = zeros
    if bias is not None:
        offset = tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)
    history = ()
    pending = ()
    age = WIDTH - 1
    for lag in tl.static_range(WIDTH - 1, 0, -1):
        history = history + (_row_before(x, initial_state, start - lag, x_row, channels, c, is_channel, WIDTH),)
        pending = pending + (zeros,)
        if PACKED:
            age = tl.where(_begins_document(seq_idx, start - lag, seq_row, length), 0, age + 1)
    weight_sums = pending + (zeros,)  # by lag
    bias_sum = zeros

    x_here, y_grad_here = x + start * x_row + c, y_grad + start * grad_row + c
    x_grad_here = x_grad + (start - (WIDTH - 1)) * out_row + c
    read_stop = min(stop + WIDTH - 1, length)
    more_row = channels.to(tl.int64)
    x_ahead = ()  # what the next round reads is asked for before this one computes
    y_grad_ahead = ()
    if more is not None:
        more += (batch * length + start) * more_row + c
        more_ahead = ()
    for u in tl.static_range(UNROLL):
        mask = is_channel & (start + u < read_stop)
        x_ahead = x_ahead + (tl.load(x_here + u * x_row, mask=mask, other=0.0),)
        y_grad_ahead = y_grad_ahead + (tl.load(y_grad_here + u * grad_row, mask=mask, other=0.0),)
        if more is not None:
            more_ahead = more_ahead + (tl.load(more + u * more_row, mask=mask, other=0.0),)
    for t0 in range(start, stop + WIDTH - 1, UNROLL):
        rows = history
        grads = ()
        ages = ()
        x_here += UNROLL * x_row
        y_grad_here += UNROLL * grad_row
        if more is not None:
            more += UNROLL * more_row
            more_next = ()
        x_next = ()
        y_grad_next = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (x_ahead[u].to(tl.float32),)
            grad = y_grad_ahead[u].to(tl.float32)
            if more is not None:
                grad += more_ahead[u].to(tl.float32)
            grads = grads + (grad,)
            mask = is_channel & (t0 + UNROLL + u < read_stop)
            x_next = x_next + (tl.load(x_here + u * x_row, mask=mask, other=0.0),)
            y_grad_next = y_grad_next + (tl.load(y_grad_here + u * grad_row, mask=mask, other=0.0),)
            if more is not None:
                more_next = more_next + (tl.load(more + u * more_row, mask=mask, other=0.0),)
            if PACKED:
                age = tl.where(_begins_document(seq_idx, t0 + u, seq_row, length), 0, age + 1)
            ages = ages + (age,)
        x_ahead = x_next
        y_grad_ahead = y_grad_next
        if more is not None:
            more_ahead = more_next
        for u in tl.static_range(UNROLL):
            t = t0 + u
            age_here = ages[u]
            grad = grads[u]
            if SILU:
                value = _before_activation(rows, WIDTH - 1 + u, taps, offset, age_here, WIDTH, PACKED)
                gate = sigmoid(value)
                grad = grad * (gate * (1.0 + value * (1.0 - gate)))
            own = tl.where(t < stop, grad, 0.0)
            bias_sum += own
            sums = ()
            for lag in tl.static_range(WIDTH):
                row = rows[WIDTH - 1 + u - lag]
                if PACKED:
                    row = tl.where(age_here >= lag, row, 0.0)
                sums = sums + (weight_sums[lag] + own * row,)
            weight_sums = sums
            reached = pending + (zeros,)
            with_this = ()
            for lag in tl.static_range(WIDTH - 1, -1, -1):
                by_lag = grad
                if PACKED:
                    by_lag = tl.where(age_here >= lag, grad, 0.0)
                with_this = with_this + (reached[WIDTH - 1 - lag] + taps[lag] * by_lag,)
            complete = with_this[0]
            pending = with_this[1:]
            if final_grad is not None:
                is_end = (t >= length) & (t < length + WIDTH - 1)
                if PACKED:
                    is_end = is_end & (age_here >= WIDTH - 1)
                end = tl.load(final_grad + (t - length) * channels + c, mask=is_channel & is_end, other=0.0)
                complete += end.to(tl.float32)
            position = t - (WIDTH - 1)
            mask = is_channel & (position >= start) & (position < stop)
            tl.store(x_grad_here + u * out_row, complete.to(x_grad.dtype.element_ty), mask=mask)
            if initial_state is not None:
                target = state_grad + (position + WIDTH - 1) * channels + c
                tl.store(target, complete.to(state_grad.dtype.element_ty), mask=is_channel & (position < 0))
        history = rows[UNROLL:]
        x_grad_here += UNROLL * out_row

    parts += (pid // groups).to(tl.int64) * KINDS * channels + c
    for lag in tl.static_range(WIDTH):
        tl.store(parts + (WIDTH - 1 - lag) * channels, weight_sums[lag], mask=is_channel)
    if bias is not None:
        tl.store(parts + WIDTH * channels, bias_sum, mask=is_channel)
