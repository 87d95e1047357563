"""A decoded token of many sequences: what lies between a layer's two large matrix products, which are cuBLAS's.

As in `triton_kernels.py`, but with the small products of Mamba-1 on tensor cores: a program has BATCH sequences at once.
While these kernels run, memory has little to do: they have it bring the matrices of the products that come next.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc, operator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.triton_kernels import prefetch
from kernels.triton_math import INTERPRETED, narrowed, softplus


@triton.jit
def fetch_ahead(matrix, program, size, each, THREADS: tl.constexpr):
    """Have the L2 cache fetch this program's share of a matrix of `size` bytes, `each` for a thread, a multiple of 16."""
    if not INTERPRETED:
        start = (program * THREADS + tl.arange(0, THREADS)).to(tl.int64) * each
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [matrix.to(tl.int64) + tl.minimum(start, size - each), tl.zeros([THREADS], tl.int32) + each],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def norm_kernel(
    parts,
    residual,
    weight,
    y,
    total,
    ahead,
    batch,
    size,
    eps,
    ahead_size,
    ahead_each,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program b: total = sum of parts (SPLITS, batch, size) + residual, y = norm(total); all is contiguous."""
    if PDL:
        gdc_launch_dependents()
    c = tl.arange(0, SIZE)
    inside = c < size
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        if ahead is not None:
            fetch_ahead(ahead, tl.program_id(0), ahead_size, ahead_each, THREADS)
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * size + c
    value = tl.zeros([SIZE], tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(parts + split * batch * size + row, mask=inside, other=0.0).to(tl.float32)
    value = value.to(y.dtype.element_ty).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row, mask=inside, other=0.0)
    tl.store(total + row, value, mask=inside)
    square = tl.sum(value * value, axis=0)
    value = value * tl.rsqrt(square / size + eps) * scale
    tl.store(y + row, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_project_kernel(
    state,
    x,
    conv_weight,
    conv_bias,
    weight,
    mixed,
    parts,
    ahead,
    batch,
    channels,
    outputs,
    x_batch,
    ahead_size,
    ahead_each,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIECES: tl.constexpr,
    HOLD: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (c, g) of Mamba-1: the convolution of CHANNELS channels of BATCH sequences, and what these add to Δ, B, C.

    state (batch, WIDTH - 1, channel) is overwritten; weight (outputs, channel), mixed (batch, channel) and parts
    (c, batch, outputs), fp32, are contiguous. PIECES · OUTPUTS is at least `outputs`.
    """
    if PDL:
        gdc_launch_dependents()
        if ahead is not None:
            fetch_ahead(
                ahead, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), ahead_size, ahead_each, THREADS
            )
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[:, None]
    inside = (b < batch) & (channel < channels)[None, :]
    taps = ()
    for tap in tl.static_range(WIDTH):
        value = tl.load(conv_weight + channel * WIDTH + tap, mask=channel < channels, other=0.0)
        taps = taps + (value.to(tl.float32)[None, :],)
    bias = tl.load(conv_bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    here = state + b.to(tl.int64) * (WIDTH - 1) * channels + channel[None, :]
    olds = ()
    for tap in tl.static_range(WIDTH - 1):
        olds = olds + (tl.load(here + tap * channels, mask=inside, other=0.0),)
    matrices = ()
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    for piece in tl.static_range(PIECES):
        output = piece * OUTPUTS + tl.arange(0, OUTPUTS)
        if HOLD:
            place = weight + output[:, None] * channels + channel[None, :]
            mask = (output < outputs)[:, None] & (channel < channels)[None, :]
            matrices = matrices + (tl.load(place, mask=mask, other=0.0),)
        elif PDL:
            column = tl.program_id(0) * CHANNELS + tl.arange(0, (CHANNELS + line - 1) // line) * line
            column = tl.minimum(column, channels - 1)
            prefetch(weight + tl.minimum(output, outputs - 1)[:, None] * channels + column[None, :])
    if PDL:
        gdc_wait()
    newest = tl.load(x + b.to(tl.int64) * x_batch + channel[None, :], mask=inside, other=0.0)
    out = bias + newest.to(tl.float32) * taps[WIDTH - 1]
    for tap in tl.static_range(WIDTH - 1):
        out += olds[tap].to(tl.float32) * taps[tap]
    rounded = (out / (1.0 + tl.exp(-out))).to(mixed.dtype.element_ty)
    tl.debug_barrier()  # a small block is loaded by several warps: all of them before the first that stores
    for tap in tl.static_range(1, WIDTH - 1):
        tl.store(here + (tap - 1) * channels, olds[tap], mask=inside)
    tl.store(here + (WIDTH - 2) * channels, newest.to(state.dtype.element_ty), mask=inside)
    tl.store(mixed + b.to(tl.int64) * channels + channel[None, :], rounded, mask=inside)
    for piece in tl.static_range(PIECES):
        output = piece * OUTPUTS + tl.arange(0, OUTPUTS)
        if HOLD:
            matrix = matrices[piece]
        else:
            place = weight + output[:, None] * channels + channel[None, :]
            mask = (output < outputs)[:, None] & (channel < channels)[None, :]
            matrix = tl.load(place, mask=mask, other=0.0)
        part = tl.dot(rounded, tl.trans(matrix))
        place = parts + (tl.program_id(0) * batch + b) * outputs + output[None, :]
        tl.store(place, part, mask=(b < batch) & (output < outputs)[None, :])


@triton.jit
def sum_kernel(parts, sums, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program i: BLOCK of `size` sums of parts (splits, size), rounded to the dtype of sums."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & (place < size)[None, :]
    values = tl.load(parts + split[:, None] * size + place[None, :], mask=mask, other=0.0)
    tl.store(sums + place, tl.sum(values, axis=0).to(sums.dtype.element_ty), mask=place < size)


@triton.jit
def dt_scan_kernel(
    state,
    x,
    z,
    projected,
    dt_weight,
    dt_bias,
    A_log,
    D,
    y,
    ahead,
    batch,
    channels,
    rank,
    states,
    z_batch,
    ahead_size,
    ahead_each,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    STREAM: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (c, g) of Mamba-1: the projection of Δ and a step of the scan for CHANNELS channels of BATCH sequences.

    projected (batch, rank + 2 · states). All but z, whose channels are side by side, is contiguous; state (batch,
    channel, state) is overwritten.
    """
    if PDL:
        gdc_launch_dependents()
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    n, k = tl.arange(0, STATES), tl.arange(0, RANK)
    is_channel, is_sequence = channel < channels, b < batch
    inside = is_sequence[:, None] & is_channel[None, :]
    whole = inside[:, :, None] & (n < states)[None, None, :]
    wide = b.to(tl.int64)[:, None]
    place_of_h = state + (wide * channels + channel[None, :])[:, :, None] * states + n[None, None, :]
    h = tl.load(place_of_h, mask=whole, other=0.0, eviction_policy="evict_first" if STREAM else "")
    place = dt_weight + channel[:, None] * rank + k[None, :]
    matrix = tl.load(place, mask=is_channel[:, None] & (k < rank)[None, :], other=0.0)
    place = A_log + channel[:, None] * states + n[None, :]
    rate = tl.load(place, mask=is_channel[:, None] & (n < states)[None, :], other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=is_channel, other=0.0).to(tl.float32)
    rate = -tl.exp(rate)
    outputs = rank + 2 * states
    if PDL:
        if ahead is not None:
            fetch_ahead(
                ahead, tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), ahead_size, ahead_each, THREADS
            )
        gdc_wait()
    of_b = projected + b[:, None] * outputs
    low = tl.load(of_b + k[None, :], mask=is_sequence[:, None] & (k < rank)[None, :], other=0.0)
    both = is_sequence[:, None] & (n < states)[None, :]
    read = tl.load(of_b + rank + n[None, :], mask=both, other=0.0).to(tl.float32)
    written = tl.load(of_b + rank + states + n[None, :], mask=both, other=0.0).to(tl.float32)
    value = tl.load(x + wide * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + wide * z_batch + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.dot(low, tl.trans(matrix)).to(y.dtype.element_ty).to(tl.float32)
    delta = softplus(delta + bias[None, :])
    h = tl.exp(delta[:, :, None] * rate[None, :, :]) * h.to(tl.float32) + (delta * value)[:, :, None] * read[:, None, :]
    tl.debug_barrier()  # as above
    tl.store(
        place_of_h, narrowed(h, state.dtype.element_ty), mask=whole, eviction_policy="evict_first" if STREAM else ""
    )
    out = tl.sum(h * written[:, None, :], axis=2) + skip[None, :] * value
    out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + wide * channels + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_kernel(
    x,
    z,
    weight,
    y,
    conv_state,
    conv_input,
    ahead,
    later,
    size,
    groups,
    eps,
    z_batch,
    conv_channels,
    conv_input_batch,
    ahead_size,
    ahead_each,
    later_size,
    later_each,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SHIFTED: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (b, g) of Mamba-2: the norm of x · silu(z) over group g of `size` channels; all but z is contiguous.

    Programs (b, groups + i): conv_state (batch, WIDTH - 1, conv_channels), whose readers are through, takes in
    conv_input (batch, conv_channels), SHIFTED channels in each.
    """
    if PDL:
        gdc_launch_dependents()
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if ahead is not None:
            fetch_ahead(ahead, program, ahead_size, ahead_each, THREADS)
        if later is not None:
            fetch_ahead(later, program, later_size, later_each, THREADS)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, SIZE)
    inside = (c < size) & (tl.program_id(1) < groups)
    first = tl.program_id(1) * size
    scale = tl.load(weight + first + c, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    if tl.program_id(1) < groups:
        place = b * groups * size + first + c
        gate = tl.load(z + b * z_batch + first + c, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value *= gate / (1.0 + tl.exp(-gate))
        value *= tl.rsqrt(tl.sum(value * value, axis=0) / size + eps) * scale
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)
    elif conv_state is not None:
        channel = (tl.program_id(1) - groups) * SHIFTED + tl.arange(0, SHIFTED)
        is_channel = channel < conv_channels
        newest = tl.load(conv_input + b * conv_input_batch + channel, mask=is_channel)
        here = conv_state + b * (WIDTH - 1) * conv_channels + channel
        olds = ()
        for tap in tl.static_range(1, WIDTH - 1):
            olds = olds + (tl.load(here + tap * conv_channels, mask=is_channel),)
        tl.debug_barrier()  # as above
        for tap in tl.static_range(WIDTH - 2):
            tl.store(here + tap * conv_channels, olds[tap], mask=is_channel)
        tl.store(here + (WIDTH - 2) * conv_channels, newest.to(conv_state.dtype.element_ty), mask=is_channel)


@triton.jit
def linear_kernel(
    x,
    weight,
    y,
    batch,
    outputs,
    x_batch,
    tile_size,
    tile_each,
    SIZE: tl.constexpr,
    BATCH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (r, s, g): OUTPUTS outputs of weight · x for BATCH sequences, from share s of the inputs.

    weight (outputs, SIZE) and y (SPLITS, batch, outputs) are contiguous; INPUTS · SPLITS divides SIZE.
    """
    SHARE: tl.constexpr = SIZE // SPLITS
    if PDL:
        gdc_launch_dependents()
        if tile_each > 0:
            program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            fetch_ahead(weight, program, tile_size, tile_each, THREADS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    b = tl.program_id(2) * BATCH + tl.arange(0, BATCH)
    k = tl.arange(0, INPUTS)
    first = tl.program_id(1) * SHARE
    rows = weight + output[:, None].to(tl.int64) * SIZE + first
    if PDL:
        gdc_wait()
    sums = tl.zeros([BATCH, OUTPUTS], tl.float32)
    for start in tl.range(0, SHARE, INPUTS, num_stages=STAGES):
        values = tl.load(
            x + b[:, None].to(tl.int64) * x_batch + (first + start + k)[None, :], mask=(b < batch)[:, None]
        )
        matrix = tl.load(rows + (start + k)[None, :], mask=(output < outputs)[:, None])
        sums = tl.dot(values, tl.trans(matrix), sums)
    place = y + (tl.program_id(1) * batch + b[:, None]).to(tl.int64) * outputs + output[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(b < batch)[:, None] & (output < outputs)[None, :])
