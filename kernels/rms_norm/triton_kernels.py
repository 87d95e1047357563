"""The norms in Triton: the kernels. `launch.py` launches them, docs/kernels.md explains them.

One pair of kernels for all of them: plain, after the residual add, gated, and over groups. A program owns one group of
channels and some rows, in the backward a span of them, so that the weight's gradient stays in registers. It holds a row
in pieces: sizes of tensors are powers of two, and 5,120 channels in one of 8,192 would leave three lanes in eight idle.
"""

# Tuples of Triton know "+" and not "*", and grow in its unrolled loops:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import sigmoid


@triton.jit
def _load(tensor, row, row_stride, channel, is_inside):
    values = tl.load(tensor + row[:, None] * row_stride + channel, mask=is_inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(tensor, row, row_stride, channel, is_inside, values):
    tl.store(tensor + row[:, None] * row_stride + channel, values.to(tensor.dtype.element_ty), mask=is_inside)


@triton.jit
def _load_weight(weight, channel, is_channel, ROWS: tl.constexpr):
    """Once for each row: rows are then in the same threads, where one for all would go through shared memory."""
    shape: tl.constexpr = [ROWS, channel.shape[1]]
    values = tl.load(weight + tl.broadcast_to(channel, shape), mask=tl.broadcast_to(is_channel, shape), other=0.0)
    return values.to(tl.float32)


@triton.jit
def _ask_for(tensor, row, row_stride, first_channel, size):
    """Have the L2 cache fetch a row of a group; one thread asks. Nothing is read: it may be about to be written."""
    WIDTH: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    address = (tensor + row * row_stride + first_channel).to(tl.int64, bitcast=True) & -16  # what the instruction takes
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
        " @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, thread; }",
        "=r,l,r",
        [address, size * WIDTH & -16],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["x_row", "residual_row", "z_row", "rows", "size", "asking"])  # one group: no divisions
def forward_kernel(
    x,
    residual,
    z,
    weight,
    y,
    total,
    inverse_rms,
    x_row,
    residual_row,
    z_row,
    rows,
    size,
    groups,
    asking,
    eps,
    NORM_FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y and 1 / rms of ROWS rows of a group of channels; with `total` also the sum x + residual.

    size: channels of a group, at most PIECES · BLOCK. It and the strides are given in units of ALIGN, which tells the
    compiler how wide its loads may be. asking: so many programs ask the L2 cache for their rows before they wait.
    """
    size = size * ALIGN
    group = tl.program_id(0) % groups
    first_row = (tl.program_id(0) // groups).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    first_channel = group * size
    x_row, y_row = x_row.to(tl.int64) * ALIGN, groups * size
    residual_row, z_row = residual_row.to(tl.int64) * ALIGN, z_row.to(tl.int64) * ALIGN
    if PDL:
        if tl.program_id(0) < asking:
            for asked in range(first_row, min(first_row + ROWS, rows)):
                _ask_for(x, asked, x_row, first_channel, size)
                if residual is not None:
                    _ask_for(residual, asked, residual_row, first_channel, size)
                if z is not None:
                    _ask_for(z, asked, z_row, first_channel, size)
        # In this order: the kernel after this one may rely on all those before this one having ended.
        gdc_wait()
        gdc_launch_dependents()
    # Everything is read before anything is written: no load may pass a store, which could be to the same address.
    givens = ()
    others = ()
    weights = ()
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK + column
        is_inside = (row < rows)[:, None] & (c < size)
        channel = first_channel + c
        givens = givens + (_load(x, row, x_row, channel, is_inside),)
        if residual is not None:
            others = others + (_load(residual, row, residual_row, channel, is_inside),)
        if z is not None:
            others = others + (_load(z, row, z_row, channel, is_inside),)
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK + column
        weights = weights + (_load_weight(weight, first_channel + c, c < size, ROWS),)
    normed = ()
    gates = ()
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for piece in tl.static_range(PIECES):
        values = givens[piece]
        if residual is not None:
            values += others[piece]
        if total is not None:
            c = piece * BLOCK + column
            _store(total, row, y_row, first_channel + c, (row < rows)[:, None] & (c < size), values)
        if z is not None:
            gate = others[piece]
            gate *= sigmoid(gate)
            if NORM_FIRST:
                gates = gates + (gate,)
            else:
                values *= gate
        squares += values * values
        normed = normed + (values,)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / size + eps)
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK + column
        values = normed[piece] * scale[:, None] * weights[piece]
        if z is not None and NORM_FIRST:
            values *= gates[piece]
        _store(y, row, y_row, first_channel + c, (row < rows)[:, None] & (c < size), values)
    tl.store(inverse_rms + row * groups + group, scale, mask=row < rows)


@triton.jit(
    do_not_specialize=[
        *("grad_row", "through_row", "x_row", "z_row", "z_grad_row", "rows", "size", "groups", "span"),
    ]
)
def backward_kernel(
    y_grad,
    through,
    x,
    z,
    weight,
    inverse_rms,
    x_grad,
    total_grad,
    z_grad,
    parts,
    grad_row,
    through_row,
    x_row,
    z_row,
    z_grad_row,
    rows,
    size,
    groups,
    span,
    NORM_FIRST: tl.constexpr,
    ALIGN: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x and z, and in `parts` (program, channel), fp32, what these rows add to that of the weight.

    `through` is added to the gradient of x, which `total_grad` gets too, in its own dtype.
    """
    size = size * ALIGN
    group = tl.program_id(0) % groups
    start = (tl.program_id(0) // groups).to(tl.int64) * span
    column = tl.arange(0, BLOCK)[None, :]
    first_channel = group * size
    weights = ()
    weight_sums = ()
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK + column
        weights = weights + (_load_weight(weight, first_channel + c, c < size, ROWS),)
        weight_sums = weight_sums + (tl.zeros([ROWS, BLOCK], tl.float32),)
    grad_row, x_row, out_row = grad_row.to(tl.int64) * ALIGN, x_row.to(tl.int64) * ALIGN, groups * size
    for first in tl.range(start, min(start + span, rows), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        scale = tl.load(inverse_rms + row * groups + group, mask=row < rows, other=0.0)[:, None]
        y_slopes = ()
        givens = ()
        z_givens = ()
        sums = ()
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for piece in tl.static_range(PIECES):
            c = piece * BLOCK + column
            is_inside = (row < rows)[:, None] & (c < size)
            channel = first_channel + c
            y_slope = _load(y_grad, row, grad_row, channel, is_inside)
            given = _load(x, row, x_row, channel, is_inside)
            norm_slope, normalised = y_slope, given * scale
            if z is not None:
                z_given = _load(z, row, z_row.to(tl.int64) * ALIGN, channel, is_inside)
                gate = z_given * sigmoid(z_given)
                if NORM_FIRST:
                    norm_slope *= gate
                else:
                    normalised *= gate
                z_givens = z_givens + (z_given,)
            sums = sums + (weight_sums[piece] + norm_slope * normalised,)
            products += norm_slope * weights[piece] * normalised
            y_slopes = y_slopes + (y_slope,)
            givens = givens + (given,)
        weight_sums = sums
        # d(v / rms) removes from the gradient of a group its component along the normalised group.
        along = (tl.sum(products, axis=1) / size)[:, None]
        for piece in tl.static_range(PIECES):
            c = piece * BLOCK + column
            is_inside = (row < rows)[:, None] & (c < size)
            channel = first_channel + c
            y_slope, given, w = y_slopes[piece], givens[piece], weights[piece]
            normalised = given * scale
            if z is not None:
                z_given = z_givens[piece]
                of_z = sigmoid(z_given)
                gate = z_given * of_z
                gate_slope = of_z * (1.0 + z_given * (1.0 - of_z))
                if NORM_FIRST:
                    _store(
                        z_grad,
                        row,
                        z_grad_row.to(tl.int64) * ALIGN,
                        channel,
                        is_inside,
                        y_slope * normalised * w * gate_slope,
                    )
                    slope = (y_slope * gate * w - normalised * along) * scale
                else:
                    slope = (y_slope * w - normalised * gate * along) * scale
                    _store(z_grad, row, z_grad_row.to(tl.int64) * ALIGN, channel, is_inside, slope * given * gate_slope)
                    slope *= gate
            else:
                slope = (y_slope * w - normalised * along) * scale
            if through is not None:
                slope += _load(through, row, through_row.to(tl.int64) * ALIGN, channel, is_inside)
            _store(x_grad, row, out_row, channel, is_inside, slope)
            if total_grad is not None:
                _store(total_grad, row, out_row, channel, is_inside, slope)
    part = parts + (tl.program_id(0) // groups).to(tl.int64) * groups * size + first_channel
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK + tl.arange(0, BLOCK)
        tl.store(part + c, tl.sum(weight_sums[piece], axis=0), mask=c < size)
