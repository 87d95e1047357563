"""SSD in Triton: decays, and their gradients. docs/kernels.md explains the kernels, `launch.py` launches them.

Decays are powers of 2. What decays on the way from position s to t of a chunk, times Δ[s], is
exp2(total[t] - origin[s]) with total the sum of the logarithms from the chunk's beginning and origin = total - log2(Δ).
A document that begins is a decay of `GONE`, and no step counts as a stronger one: so what one fp32 number loses of a
total is of no weight beside the rounding of 16-bit activations. For fp32 ones totals are EXACT: two fp32 numbers.

Axes: rows of a chunk q (t where they read, s where they write), head_dim p, state n. `padded`: length in whole chunks.
"""

import triton
import triton.language as tl

from kernels.sum_parts import sum_rows
from kernels.triton_math import clamp, exp2, sigmoid, softplus

LOG2_E = tl.constexpr(1.4426950408889634)
GONE = tl.constexpr(-160.0)  # as a power of 2: fp32 has nothing that small


# Places, not numbers as constants: Triton compares each global constant of a kernel at every launch.
@triton.jit
def decay_planes(decays, plane):
    """Where the planes of `decays` begin: totals, origins, Δ, sums of Δ, what fp32 loses of totals and of origins."""
    lows = decays + 4 * plane
    return decays, decays + plane, decays + 2 * plane, decays + 3 * plane, lows, lows + plane


@triton.jit
def sum_planes(sums, plane, HALVES: tl.constexpr):
    """Where the planes of `sums` begin.

    What is read of earlier positions of a block, and of the block before; what is written for later ones, / Δ, and for
    the next block, and the first of these times the sum of Δ in between, each by the chunk that reads it; what is read
    and what is written, / Δ, by way of states.
    """
    writtens = sums + 2 * plane
    near_writtens = writtens + HALVES * plane
    ages = near_writtens + HALVES * plane
    from_states = ages + HALVES * plane
    return sums, sums + plane, writtens, near_writtens, ages, from_states, from_states + plane


@triton.jit(
    do_not_specialize=[
        *("dt_batch", "dt_row", "dt_head", "seq_batch", "seq_row"),
        *("dt_min", "dt_max", "length", "heads", "chunks"),
    ]
)
def decays_kernel(
    dt,
    A,
    dt_bias,
    seq_idx,
    decays,
    dt_batch,
    dt_row,
    dt_head,
    seq_batch,
    seq_row,
    dt_min,
    dt_max,
    length,
    heads,
    chunks,
    SOFTPLUS: tl.constexpr,
    EXACT: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Δ and the two parts of the totals of the logarithms of the decays, in chunks of Q positions.

    decays: (plane, batch, head, padded) fp32. Past the end Δ is 0 and nothing decays.
    Programs: (batch x chunks, heads / HEADS).
    """
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    t = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (t < length)[:, None] & (head < heads)[None, :]
    delta = raw_delta(dt + batch * dt_batch, dt_bias, t, head, mask, dt_row, dt_head)
    if SOFTPLUS:
        delta = softplus(delta)
    delta = tl.where(mask, clamp(delta, dt_min, dt_max), 0.0)
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float64) * LOG2_E
    power = delta.to(tl.float64) * rate[None, :]
    power = tl.where(power < GONE, GONE, power)  # NaN stays NaN
    if seq_idx is not None:
        begins = begins_document(seq_idx + batch * seq_batch, t, seq_row, length)
        power = tl.where(begins[:, None], GONE, power)
    total = tl.cumsum(power, axis=0)
    origin = total - tl.log2(delta.to(tl.float64))
    padded = chunks.to(tl.int64) * Q
    plane = tl.num_programs(0) // chunks * heads * padded
    totals, origins, deltas, ages, totals_low, origins_low = decay_planes(decays, plane)
    place = (batch * heads + head)[None, :] * padded + t[:, None]
    is_head = (head < heads)[None, :]
    tl.store(totals + place, total.to(tl.float32), mask=is_head)
    tl.store(origins + place, origin.to(tl.float32), mask=is_head)
    tl.store(deltas + place, delta, mask=is_head)
    tl.store(ages + place, tl.cumsum(delta.to(tl.float64), axis=0).to(tl.float32), mask=is_head)
    if EXACT:
        tl.store(totals_low + place, rounded_off(total), mask=is_head)
        tl.store(origins_low + place, rounded_off(origin), mask=is_head)


@triton.jit
def rounded_off(value):
    """What an fp64 number loses when it becomes fp32, as fp32."""
    high = value.to(tl.float32).to(tl.float64)
    return tl.where(high == value, 0.0, value - high).to(tl.float32)  # without inf - inf


@triton.jit
def raw_delta(dt, dt_bias, t, head, mask, dt_row, dt_head):
    """dt + dt_bias, (t, head)."""
    place = dt + t[:, None].to(tl.int64) * dt_row + head[None, :].to(tl.int64) * dt_head
    delta = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + head[None, :], mask=mask, other=0.0).to(tl.float32)
    return delta


@triton.jit
def begins_document(seq_idx, t, seq_row, length):
    """Whether another document begins at t than that of t-1."""
    is_inside = (t > 0) & (t < length)
    place = seq_idx + t.to(tl.int64) * seq_row
    return tl.load(place, mask=is_inside, other=0) != tl.load(place - seq_row, mask=is_inside, other=0)


@triton.jit
def block_power(totals, row, block, is_head, CHUNK: tl.constexpr, HALVES: tl.constexpr):
    """The logarithm, (head), of what decays in a block, from the totals of its chunks; row: where heads' rows begin."""
    place = totals + row + block * (HALVES * CHUNK) + CHUNK - 1
    power = tl.load(place, mask=is_head, other=0.0)
    for chunk in tl.static_range(1, HALVES):
        power += tl.load(place + chunk * CHUNK, mask=is_head, other=0.0)
    return power


@triton.jit
def state_powers(totals, row, t, block, blocks, is_head, CHUNK: tl.constexpr, HALVES: tl.constexpr):
    """The logarithms of the decays between a block's positions t and the states that `flows_kernel` reads for them.

    From the state before the last block up to t, from t to that after the next one, each (t, head), and through the
    block, (head). The first block and the last one have no other beyond them.
    """
    total = tl.load(totals + row[None, :] + t[:, None], mask=is_head[None, :], other=0.0)
    for chunk in tl.static_range(1, HALVES):
        end = tl.load(totals + row + (block * HALVES + chunk) * CHUNK - 1, mask=is_head, other=0.0)
        total += tl.where(t[:, None] >= (block * HALVES + chunk) * CHUNK, end[None, :], 0.0)
    power = block_power(totals, row, block, is_head, CHUNK, HALVES)
    before = block_power(totals, row, block - 1, is_head & (block > 0), CHUNK, HALVES)
    after = block_power(totals, row, block + 1, is_head & (block < blocks - 1), CHUNK, HALVES)
    return total + before[None, :], power[None, :] - total + after[None, :], power


@triton.jit(
    do_not_specialize=[
        *("dt_grad_batch", "dt_grad_row", "dt_batch", "dt_row", "dt_head"),
        *("dt_min", "dt_max", "length", "heads", "group_heads", "blocks"),
    ]
)
def delta_kernel(
    dt,
    A,
    dt_bias,
    decays,
    sums,
    own_products,
    through,
    owns,
    dt_grad,
    parts,
    dt_grad_batch,
    dt_grad_row,
    dt_batch,
    dt_row,
    dt_head,
    dt_min,
    dt_max,
    length,
    heads,
    group_heads,
    blocks,
    SOFTPLUS: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of dt of one block, and the block's parts of those of A, dt_bias and a D of one number per head.

    The gradient of a decay's logarithm is what all products that the decay is part of add to the loss: those that
    begin before it and are read at it or later. What position s wrote adds to the gradient of Δ[s] by way of later
    positions of its block (written), of later blocks (to_later), and itself (own). For the gradient of A the pairs in
    a block come with the sum of Δ in between: among sums of them large numbers would cancel. sums, own_products,
    through: what `flows_kernel` left; owns (batch, head, padded): y_grad·x; parts: (batch x blocks, 3, head) fp32.
    Programs: (batch x blocks, heads / HEADS).
    """
    Q: tl.constexpr = HALVES * CHUNK
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    t = block * Q + tl.arange(0, Q)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (head < heads)[None, :]
    mask = (t < length)[:, None] & is_head
    padded = blocks.to(tl.int64) * Q
    plane = tl.num_programs(0) // blocks * heads * padded
    place = (batch * heads + head)[None, :] * padded + t[:, None]
    totals, _, deltas, ages, totals_low, _ = decay_planes(decays, plane)
    row = (batch * heads + head) * padded
    from_before, to_after, through_block = state_powers(totals, row, t, block, blocks, head < heads, CHUNK, HALVES)
    if EXACT:
        low = state_powers(totals_low, row, t, block, blocks, head < heads, CHUNK, HALVES)
        from_before, to_after, through_block = from_before + low[0], to_after + low[1], through_block + low[2]
    reads, near_reads, writtens, near_writtens, written_ages, from_states, to_states = sum_planes(sums, plane, HALVES)
    delta = tl.load(deltas + place, mask=mask, other=0.0)
    is_first = mask & (t % Q < CHUNK)[:, None]  # of what the first chunk reads
    written = tl.load(writtens + place, mask=is_first, other=0.0)
    to_later = tl.load(to_states + place, mask=mask, other=0.0) * exp2(to_after)
    aged = tl.load(written_ages + place, mask=is_first, other=0.0)
    is_near = mask & (block < blocks - 1)
    to_later += tl.load(near_writtens + place, mask=is_near, other=0.0)
    if HALVES == 2:
        written += tl.load(writtens + plane + place, mask=mask, other=0.0)
        to_later += tl.load(near_writtens + plane + place, mask=is_near, other=0.0)
        first_end = tl.load(ages + row + block * Q + CHUNK - 1, mask=head < heads, other=0.0)
        aged += tl.load(written_ages + plane + place, mask=mask, other=0.0)
    own = tl.load(owns + place, mask=mask, other=0.0)
    groups = heads // group_heads
    own_place = (batch * groups + head // group_heads)[None, :] * padded + t[:, None]
    own_product = tl.load(own_products + own_place, mask=mask, other=0.0)
    delta_grad = written + to_later + own * own_product

    wide = delta.to(tl.float64)
    in_pairs = tl.load(reads + place, mask=mask, other=0.0).to(tl.float64) - wide * written.to(tl.float64)
    in_block = tl.sum(in_pairs, axis=0)[None, :] - tl.cumsum(in_pairs, axis=0) + in_pairs
    read = tl.load(near_reads + place, mask=mask & (block > 0), other=0.0).to(tl.float64)
    read += (tl.load(from_states + place, mask=mask, other=0.0) * exp2(from_before)).to(tl.float64)
    to_later = wide * to_later.to(tl.float64)
    passed = tl.load(through + (batch * heads + head) * blocks + block, mask=head < heads, other=0.0)
    passed = (passed * exp2(through_block)).to(tl.float64)
    beyond = tl.sum(read, axis=0)[None, :] - tl.cumsum(read, axis=0) + read
    beyond += tl.cumsum(to_later, axis=0) - to_later + passed[None, :]
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)
    # What fp32 lost of the sums of Δ that pairs were multiplied with the differences of.
    lost = tl.cumsum(wide, axis=0) - tl.load(ages + place, mask=mask, other=0.0).to(tl.float64)
    if HALVES == 2:
        lost -= tl.where(t[:, None] % Q >= CHUNK, first_end.to(tl.float64)[None, :], 0.0)
    A_grad = tl.sum(wide * (aged.to(tl.float64) + beyond) + lost * in_pairs, axis=0)

    raw = raw_delta(dt + batch * dt_batch, dt_bias, t, head, mask, dt_row, dt_head)
    grad = delta_grad + (in_block + beyond).to(tl.float32) * rate[None, :]
    free = raw
    if SOFTPLUS:
        free = softplus(raw)
        grad *= sigmoid(raw)
    grad = tl.where(mask & (free >= dt_min) & (free <= dt_max), grad, 0.0)
    target = dt_grad + batch * dt_grad_batch + t[:, None].to(tl.int64) * dt_grad_row + head[None, :]
    tl.store(target, grad.to(dt_grad.dtype.element_ty), mask=mask)

    parts += tl.program_id(0).to(tl.int64) * 3 * heads + head
    tl.store(parts, A_grad.to(tl.float32), mask=head < heads)
    tl.store(parts + heads, tl.sum(grad, axis=0), mask=head < heads)
    tl.store(parts + 2 * heads, tl.sum(own, axis=0), mask=head < heads)


@triton.jit(do_not_specialize=["rows", "heads"])
def head_sums_kernel(
    parts, A_grad, dt_bias_grad, D_grad, rows, heads, KINDS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr
):
    """The gradients of A, dt_bias and D, each (head) fp32: sums over the rows of what `delta_kernel` left in parts.

    Programs: (heads / HEADS, 3).
    """
    head, kind = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.program_id(1)
    is_head = head < heads
    total = sum_rows(parts, kind, head, is_head, rows, heads, KINDS, ROWS)
    tl.store(A_grad + head, total, mask=is_head & (kind == 0))
    tl.store(dt_bias_grad + head, total, mask=is_head & (kind == 1))
    tl.store(D_grad + head, total, mask=is_head & (kind == 2))
