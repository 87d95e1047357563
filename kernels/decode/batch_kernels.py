"""A decoded token of many sequences, for a layer of Mamba-1 or what lies between the large products of Mamba-2.

As in `triton_kernels.py`, but with products on tensor cores: a program has BATCH sequences at once.
"""

# mypy: disable-error-code="assignment, var-annotated, misc, operator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import INTERPRETED, narrowed, softplus


@triton.jit
def fetch(matrix, program, size, each, THREADS: tl.constexpr):
    """Have the L2 cache fetch a program's share of a matrix of `size` bytes; each: of a thread, a multiple of 16."""
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
    batch,
    size,
    eps,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program b: total = sum of parts (SPLITS, batch, size) + residual, y = norm(total); all is contiguous."""
    if PDL:
        gdc_launch_dependents()
    c = tl.arange(0, SIZE)
    inside = c < size
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if PDL:
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
    batch,
    channels,
    rank,
    states,
    z_batch,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
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
    h = tl.load(place_of_h, mask=whole, other=0.0)
    place = dt_weight + channel[:, None] * rank + k[None, :]
    matrix = tl.load(place, mask=is_channel[:, None] & (k < rank)[None, :], other=0.0)
    place = A_log + channel[:, None] * states + n[None, :]
    rate = tl.load(place, mask=is_channel[:, None] & (n < states)[None, :], other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=is_channel, other=0.0).to(tl.float32)
    rate = -tl.exp(rate)
    outputs = rank + 2 * states
    if PDL:
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
    tl.debug_barrier()  # a small block is loaded by several warps: all of them before the first that stores
    tl.store(place_of_h, narrowed(h, state.dtype.element_ty), mask=whole)
    out = tl.sum(h * written[:, None, :], axis=2) + skip[None, :] * value
    out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + wide * channels + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_kernel(x, z, weight, y, size, eps, z_batch, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Program (b, g) of Mamba-2: the norm of x · silu(z) over group g of `size` channels; all but z is contiguous."""
    if PDL:
        gdc_launch_dependents()
    c = tl.arange(0, SIZE)
    inside = c < size
    first = tl.program_id(1) * size
    scale = tl.load(weight + first + c, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    place = b * tl.num_programs(1) * size + first + c
    gate = tl.load(z + b * z_batch + first + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value *= gate / (1.0 + tl.exp(-gate))
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / size + eps) * scale
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x,
    weight,
    y,
    batch,
    outputs,
    x_batch,
    matrix_size,
    matrix_each,
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

    weight (outputs, SIZE) and y (SPLITS, batch, outputs) are contiguous; INPUTS · SPLITS divides SIZE. matrix_size,
    matrix_each: bytes of weight that are fetched before the kernel before has ended, and by a thread; 0: none.
    """
    SHARE: tl.constexpr = SIZE // SPLITS
    if PDL:
        gdc_launch_dependents()
        if matrix_each > 0:
            program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            fetch(weight, program, matrix_size, matrix_each, THREADS)
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
