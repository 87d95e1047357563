"""A decoded token of a few sequences in three or four kernels a layer, each bound by the weights that it reads.

For so few rows a matrix product is a sum along each row of the matrix. Between two of them lie operators of a few
microseconds, which cost as much as a launch; here they are part of the product before or after them. With PDL
(programmatic dependent launch, compute capability 9.0) the programs of a kernel start while the kernel before still
runs, load what no kernel writes, which is nearly all they need, and wait for it only then. Everything is rounded where
the separate operators round it.
"""

# Tuples of Triton know "+" and not "*", and grow in its unrolled loops:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc, operator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import INTERPRETED, narrowed, softplus


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def prefetch(place):
    """Have the L2 cache fetch the 128 bytes around each address, whoever writes them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [place.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_from(matrix, start, size, LINES: tl.constexpr):
    """LINES times 128 bytes of a matrix of `size` elements."""
    line: tl.constexpr = 1024 // matrix.dtype.element_ty.primitive_bitwidth
    prefetch(matrix + tl.minimum(start + tl.arange(0, LINES) * line, size - 1))


@triton.jit
def prefetch_share(matrix, program, size, LINES: tl.constexpr):
    """What falls to a program when all of them fetch a matrix, LINES times 128 bytes each."""
    line: tl.constexpr = 1024 // matrix.dtype.element_ty.primitive_bitwidth
    prefetch_from(matrix, program * (LINES * line), size, LINES)


@triton.jit
def _tile(weight, row, outputs, SIZE: tl.constexpr, PIECE: tl.constexpr, ONCE: tl.constexpr):
    """Rows of a matrix in pieces."""
    pieces = ()
    for piece in tl.static_range(SIZE // PIECE):
        place = weight + row[:, None].to(tl.int64) * SIZE + (piece * PIECE + tl.arange(0, PIECE))[None, :]
        pieces = pieces + (
            tl.load(place, mask=(row < outputs)[:, None], other=0.0, eviction_policy="evict_first" if ONCE else ""),
        )
    return pieces


@triton.jit
def linear_kernel(
    x,
    residual,
    z,
    norm_weight,
    weight,
    y,
    total,
    conv_state,
    conv_input,
    ahead,
    outputs,
    eps,
    x_batch,
    z_batch,
    conv_channels,
    conv_input_batch,
    ahead_size,
    BATCH: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program r: TILES times ROWS outputs of y = weight · v for all sequences, v = [norm](x [+ residual] [· silu(z)]).

    weight (outputs, SIZE), y, residual and total (batch, SIZE) are contiguous; PIECE divides the channels of each of
    the GROUPS that the norm has. total gets x + residual in fp32. conv_state (batch, WIDTH - 1, conv_channels), whose
    readers are through, takes in conv_input, SHIFTED channels by each program. LINES, AHEAD: times 128 bytes that a
    program has the L2 cache fetch of each of its later tiles, and of `ahead`, what the next kernels will read.
    """
    if PDL:
        gdc_launch_dependents()
    programs, program = tl.num_programs(0), tl.program_id(0)
    k = tl.arange(0, PIECE)
    PIECES: tl.constexpr = SIZE // PIECE
    PER_GROUP: tl.constexpr = PIECES // GROUPS
    matrix = _tile(weight, program * ROWS + tl.arange(0, ROWS), outputs, SIZE, PIECE, ONCE)
    scales = ()
    if norm_weight is not None:
        for piece in tl.static_range(PIECES):
            scales = scales + (tl.load(norm_weight + piece * PIECE + k).to(tl.float32),)
    if PDL:
        if LINES > 0:
            for tile in tl.static_range(1, TILES):
                start = (program + tile * programs).to(tl.int64) * (ROWS * SIZE)
                prefetch_from(weight, start, tl.full((), SIZE, tl.int64) * outputs, LINES)
        if ahead is not None:
            prefetch_share(ahead, program, ahead_size, AHEAD)
        gdc_wait()
    vectors = ()
    for b in tl.static_range(BATCH):
        values = ()
        squares = ()
        for piece in tl.static_range(PIECES):
            v = tl.load(x + b * x_batch + piece * PIECE + k).to(tl.float32)
            if residual is not None:
                v += tl.load(residual + b * SIZE + piece * PIECE + k)
            if z is not None:
                v *= _silu(tl.load(z + b * z_batch + piece * PIECE + k).to(tl.float32))
            values = values + (v,)
            if norm_weight is not None:
                squares = squares + (tl.sum(v * v, axis=0),)
        for piece in tl.static_range(PIECES):
            v = values[piece]
            if norm_weight is not None:
                square = 0.0
                for other in tl.static_range(PER_GROUP):
                    square += squares[piece // PER_GROUP * PER_GROUP + other]
                v *= tl.rsqrt(square / (SIZE // GROUPS) + eps) * scales[piece]
            vectors = vectors + (v.to(x.dtype.element_ty).to(tl.float32),)
        if total is not None:  # noqa: SIM102  decided when it is compiled, the other one when it runs
            if program == 0:
                for piece in tl.static_range(PIECES):
                    tl.store(total + b * SIZE + piece * PIECE + k, values[piece])
    for tile in tl.static_range(TILES):
        row = (program + tile * programs) * ROWS + tl.arange(0, ROWS)
        current = matrix
        if tile + 1 < TILES:
            matrix = _tile(weight, row + programs * ROWS, outputs, SIZE, PIECE, ONCE)
        for b in tl.static_range(BATCH):
            sums = tl.zeros([ROWS, PIECE], tl.float32)
            for piece in tl.static_range(PIECES):
                sums += current[piece].to(tl.float32) * vectors[b * PIECES + piece][None, :]
            tl.store(y + b * outputs + row, tl.sum(sums, axis=1).to(y.dtype.element_ty), mask=row < outputs)
    if conv_state is not None:
        c = program * SHIFTED + tl.arange(0, SHIFTED)
        for b in tl.static_range(BATCH):
            newest = tl.load(conv_input + b * conv_input_batch + c, mask=c < conv_channels)
            taps = ()
            place = conv_state + b * (WIDTH - 1) * conv_channels + c
            for tap in tl.static_range(1, WIDTH - 1):
                taps = taps + (tl.load(place + tap * conv_channels, mask=c < conv_channels),)
            tl.debug_barrier()  # as in conv_ssd_kernel
            for tap in tl.static_range(WIDTH - 2):
                tl.store(place + tap * conv_channels, taps[tap], mask=c < conv_channels)
            place += (WIDTH - 2) * conv_channels
            tl.store(place, newest.to(conv_state.dtype.element_ty), mask=c < conv_channels)


@triton.jit
def _filter(weight, bias, channel, mask, WIDTH: tl.constexpr):
    """Taps and bias of a convolution, fp32; weight (channel, WIDTH)."""
    taps = ()
    for tap in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + channel * WIDTH + tap, mask=mask, other=0.0).to(tl.float32),)
    return taps, tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolved(state, x, channel, mask, channels, taps, bias, WIDTH: tl.constexpr):
    """silu of a causal convolution at one position, in fp32 but rounded as x is; state (WIDTH - 1, channels)."""
    out = bias + tl.load(x + channel, mask=mask, other=0.0).to(tl.float32) * taps[WIDTH - 1]
    for tap in tl.static_range(WIDTH - 1):
        out += tl.load(state + tap * channels + channel, mask=mask, other=0.0).to(tl.float32) * taps[tap]
    return _silu(out).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def conv_project_kernel(
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
    BATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program s of Mamba-1: the convolution of CHANNELS channels, and what these add to Δ, B and C.

    state (batch, WIDTH - 1, channel) is overwritten; weight (outputs, channel), mixed (batch, channel) and parts
    (batch, s, outputs), fp32, are contiguous.
    """
    if PDL:
        gdc_launch_dependents()
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)
    inside, row = channel < channels, output < outputs
    place = weight + output[:, None] * channels + channel[None, :]
    matrix = tl.load(place, mask=row[:, None] & inside[None, :], other=0.0)
    taps, bias = _filter(conv_weight, conv_bias, channel, inside, WIDTH)
    if PDL:
        gdc_wait()
    for b in tl.static_range(BATCH):
        here = state + b * (WIDTH - 1) * channels + channel
        newest = tl.load(x + b * x_batch + channel, mask=inside, other=0.0)
        out = bias + newest.to(tl.float32) * taps[WIDTH - 1]
        olds = ()
        for tap in tl.static_range(WIDTH - 1):
            olds = olds + (tl.load(here + tap * channels, mask=inside, other=0.0),)
        for tap in tl.static_range(WIDTH - 1):
            out += olds[tap].to(tl.float32) * taps[tap]
        rounded = _silu(out).to(mixed.dtype.element_ty)
        part = tl.sum(matrix.to(tl.float32) * rounded.to(tl.float32)[None, :], axis=1)
        tl.debug_barrier()  # as in conv_ssd_kernel
        tl.store(mixed + b * channels + channel, rounded, mask=inside)
        tl.store(parts + (b * tl.num_programs(0) + tl.program_id(0)) * outputs + output, part, mask=row)
        for tap in tl.static_range(1, WIDTH - 1):
            tl.store(here + (tap - 1) * channels, olds[tap], mask=inside)
        tl.store(here + (WIDTH - 2) * channels, newest.to(state.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_parts(parts, first, count, splits, outputs, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Outputs [first, first + count) of the projection, fp32 (SIZE,); zeros beyond."""
    split, output = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    mask = (split < splits)[:, None] & (output < count)[None, :]
    return tl.sum(tl.load(parts + split[:, None] * outputs + first + output[None, :], mask=mask, other=0.0), axis=0)


@triton.jit
def dt_scan_kernel(
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
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program c of Mamba-1: the projection of Δ and a step of the scan for CHANNELS channels.

    All but z, whose channels are side by side, is contiguous; state (batch, channel, state) is overwritten.
    """
    if PDL:
        gdc_launch_dependents()
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, k = tl.arange(0, STATES), tl.arange(0, RANK)
    row, column = channel < channels, n < states
    both = row[:, None] & column[None, :]
    matrix = tl.load(
        dt_weight + channel[:, None] * rank + k[None, :], mask=row[:, None] & (k < rank)[None, :], other=0.0
    )
    rate = tl.load(A_log + channel[:, None] * states + n[None, :], mask=both, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=row, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=row, other=0.0).to(tl.float32)
    rate = -tl.exp(rate)
    outputs = rank + 2 * states
    if PDL:
        for b in tl.static_range(BATCH):
            prefetch(state + (b * channels + tl.minimum(channel, channels - 1)) * states)
        gdc_wait()
    for b in tl.static_range(BATCH):
        place = state + (b * channels + channel[:, None]) * states + n[None, :]
        h = tl.load(place, mask=both, other=0.0).to(tl.float32)
        value = tl.load(x + b * channels + channel, mask=row, other=0.0).to(tl.float32)
        gate = tl.load(z + b * z_batch + channel, mask=row, other=0.0).to(tl.float32)
        of_b = parts + b * splits * outputs
        low = _sum_of_parts(of_b, 0, rank, splits, outputs, RANK, SPLITS).to(y.dtype.element_ty)
        read = _sum_of_parts(of_b, rank, states, splits, outputs, STATES, SPLITS).to(y.dtype.element_ty)
        written = _sum_of_parts(of_b, rank + states, states, splits, outputs, STATES, SPLITS).to(y.dtype.element_ty)
        delta = tl.sum(matrix.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
        delta = softplus(delta.to(y.dtype.element_ty).to(tl.float32) + bias)
        h = tl.exp(delta[:, None] * rate) * h + (delta * value)[:, None] * read.to(tl.float32)[None, :]
        out = (tl.sum(h * written.to(tl.float32)[None, :], axis=1) + skip * value) * _silu(gate)
        tl.debug_barrier()  # as in conv_ssd_kernel
        tl.store(place, narrowed(h, state.dtype.element_ty), mask=both)
        tl.store(y + b * channels + channel, out.to(y.dtype.element_ty), mask=row)


@triton.jit
def conv_ssd_kernel(
    state,
    conv_state,
    x,
    dt,
    conv_weight,
    conv_bias,
    A_log,
    D,
    dt_bias,
    y,
    heads,
    head_dim,
    states,
    groups,
    x_batch,
    dt_batch,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (h, r, b) of Mamba-2: convolution and SSD step of ROWS of the head_dim rows of head h of sequence b.

    x (batch, channel of the convolution: heads · head_dim, then B and C of each group). conv_state, which programs
    share, is only read here; state (batch, head, head_dim, state) is overwritten.
    """
    if PDL:
        gdc_launch_dependents()
    head, sequence = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d_inner = heads * head_dim
    channels = d_inner + 2 * groups * states
    in_head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, STATES)
    row, column = in_head < head_dim, n < states
    both = row[:, None] & column[None, :]
    of_x = head * head_dim + in_head
    of_B = d_inner + head // (heads // groups) * states + n
    of_C = of_B + groups * states
    x_taps, x_bias = _filter(conv_weight, conv_bias, of_x, row, WIDTH)
    B_taps, B_bias = _filter(conv_weight, conv_bias, of_B, column, WIDTH)
    C_taps, C_bias = _filter(conv_weight, conv_bias, of_C, column, WIDTH)
    rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    place = state + (sequence * heads + head) * head_dim * states + in_head[:, None] * states + n[None, :]
    h = tl.load(place, mask=both, other=0.0)
    if PDL:
        gdc_wait()
    delta = softplus(tl.load(dt + sequence * dt_batch + head).to(tl.float32) + bias)
    x += sequence * x_batch
    conv_state += sequence * (WIDTH - 1) * channels
    value = _convolved(conv_state, x, of_x, row, channels, x_taps, x_bias, WIDTH)
    read = _convolved(conv_state, x, of_B, column, channels, B_taps, B_bias, WIDTH)
    written = _convolved(conv_state, x, of_C, column, channels, C_taps, C_bias, WIDTH)
    h = tl.exp(delta * rate) * h.to(tl.float32) + (delta * value)[:, None] * read[None, :]
    out = tl.sum(h * written[None, :], axis=1) + skip * value
    # A small block is loaded by several warps, of which one may still be on its way when another one stores.
    tl.debug_barrier()
    tl.store(place, narrowed(h, state.dtype.element_ty), mask=both)
    tl.store(y + sequence * d_inner + of_x, out.to(y.dtype.element_ty), mask=row)


@triton.jit
def greedy_kernel(logits, token, classes, row_stride, REFUSED: tl.constexpr, BLOCK: tl.constexpr):
    """Program b: the first of the largest of a row's first `classes` logits; REFUSED where one is not finite."""
    row = logits + tl.program_id(0).to(tl.int64) * row_stride
    c = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    is_bad = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, classes, BLOCK):
        values = tl.load(row + first + c, mask=first + c < classes, other=float("-inf")).to(tl.float32)
        is_bad |= ((first + c < classes) & ((values - values) != 0.0)).to(tl.int32)
        place = tl.where(values > best, first + c, place)
        best = tl.maximum(best, values)
    largest = tl.max(best, axis=0)
    found = tl.min(tl.where(best == largest, place, 2147483647), axis=0)
    tl.store(token + tl.program_id(0), tl.where(tl.max(is_bad, axis=0) > 0, REFUSED, found).to(tl.int64))
