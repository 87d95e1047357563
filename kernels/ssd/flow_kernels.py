"""The backward of SSD in Triton: the sums that the gradients of decays and Δ are made of, by `delta_kernel`.

They decide how exact dA is. Time is cut into blocks here, of one or two chunks. Pairs of positions in one block or in
neighbouring ones are computed as pairs, of factors that were never rounded; those further apart by way of the states at
the ends of blocks, which are kept in the activations' dtype, and which have decayed through a whole block when they are
read.
"""

import triton
import triton.language as tl

from kernels.ssd.decay_kernels import decay_planes, sum_planes
from kernels.ssd.forward_kernels import product, tile
from kernels.triton_math import exp2


@triton.jit
def block_totals(totals, q, CHUNK: tl.constexpr, Q: tl.constexpr):
    """Totals from a block's beginning at q, and at its end, from those of its chunks."""
    total, end = tl.load(totals + q), tl.load(totals + CHUNK - 1)
    for chunk in tl.static_range(1, Q // CHUNK):
        total += tl.where(q >= chunk * CHUNK, end, 0.0)
        end += tl.load(totals + (chunk + 1) * CHUNK - 1)
    return total, end


@triton.jit(
    do_not_specialize=[
        *("y_grad_batch", "y_grad_row", "y_grad_head", "x_batch", "x_row", "x_head"),
        *("B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
        *("length", "heads", "group_heads", "head_dim", "states", "blocks", "parts", "part_heads"),
    ]
)
def flows_kernel(
    y_grad,
    x,
    B,
    C,
    decays,
    starts,
    end_grads,
    sums,
    own_products,
    through,
    y_grad_batch,
    y_grad_row,
    y_grad_head,
    x_batch,
    x_row,
    x_head,
    B_batch,
    B_row,
    B_group,
    C_batch,
    C_row,
    C_group,
    length,
    heads,
    group_heads,
    head_dim,
    states,
    blocks,
    parts,
    part_heads,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What pairs of positions and states add to the loss, head after head of a part of a group.

    starts, end_grads: what `states_kernel` left, of chunks. sums (plane, batch, head, padded), own_products (batch,
    group, padded), through (batch, head, block), all fp32, are for `delta_kernel`. Blocks have Q positions, and
    padded is the length in whole ones.
    Programs: batch x (blocks + 2) x groups x parts x 3, the last fastest: pairs in a block; pairs of a block with the
    next; what the next block reads of the state before a block, what the last one wrote of that after it, and what
    passes through. The first block has a block without positions before it, the last one such a block after it.
    """
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    groups = heads // group_heads
    pid = tl.program_id(0)
    role = pid % 3
    part = pid // 3 % parts
    group = pid // 3 // parts % groups
    block = pid // 3 // parts // groups % (blocks + 2) - 1
    batch = (pid // 3 // parts // groups // (blocks + 2)).to(tl.int64)
    batches = tl.num_programs(0) // (3 * parts * groups * (blocks + 2))
    first = group * group_heads + part * part_heads
    last = min(first + part_heads, (group + 1) * group_heads)

    # The blocks where is written (s) and read (t), and how many of their positions are in the sequence: at most 0 for a
    # block outside of it, which is read nowhere else than its neighbour, and written nowhere.
    s_block, t_block = tl.where(role == 2, block - 1, block), tl.where(role == 0, block, block + 1)
    s_rows, t_rows = tl.where(s_block >= 0, length - s_block * Q, 0), tl.where(t_block >= 0, length - t_block * Q, 0)
    s_begin = tl.minimum(tl.maximum(s_block, 0), blocks - 1).to(tl.int64) * Q
    t_begin = tl.minimum(tl.maximum(t_block, 0), blocks - 1).to(tl.int64) * Q
    s, t, n, p = tl.arange(0, Q), tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    x_row, y_grad_row, B_row, C_row = x_row * ALIGN, y_grad_row * ALIGN, B_row * ALIGN, C_row * ALIGN
    x_head, y_grad_head = x_head.to(tl.int64) * ALIGN, y_grad_head.to(tl.int64) * ALIGN
    x += batch * x_batch * ALIGN + s_begin * x_row
    y_grad += batch * y_grad_batch * ALIGN + t_begin * y_grad_row
    B += batch * B_batch * ALIGN + group.to(tl.int64) * B_group * ALIGN + s_begin * B_row
    C += batch * C_batch * ALIGN + group.to(tl.int64) * C_group * ALIGN + t_begin * C_row
    B_tile = tile(B, s, B_row, s_rows, n, states, WHOLE)
    C_tile = tile(C, t, C_row, t_rows, n, states, WHOLE)
    padded = blocks.to(tl.int64) * Q
    plane = batches * heads * padded
    decays += batch * heads * padded
    sums += batch * heads * padded

    if role == 0:
        if s_rows > 0:
            products = product(B_tile, tl.trans(C_tile), None, EXACT)
            if part == 0:
                own_product = tl.sum(tl.where(t[None, :] == s[:, None], products, 0.0), axis=1)
                place = own_products + (batch * groups + group) * padded + s_begin
                tl.store(place + s, own_product)
            products = tl.where(t[None, :] > s[:, None], products, 0.0)
            for head in tl.range(first, last, num_stages=STAGES):
                x_tile = tile(x + x_head * head, s, x_row, s_rows, p, head_dim, WHOLE)
                grad = tile(y_grad + y_grad_head * head, t, y_grad_row, t_rows, p, head_dim, WHOLE)
                totals, _, deltas, totals_low, _ = decay_planes(decays + head * padded + s_begin, plane)
                delta = tl.load(deltas + s)
                total_s, _ = block_totals(totals, s, CHUNK, Q)
                total_t, _ = block_totals(totals, t, CHUNK, Q)
                power = total_t[None, :] - total_s[:, None]
                if EXACT:
                    total_s, _ = block_totals(totals_low, s, CHUNK, Q)
                    total_t, _ = block_totals(totals_low, t, CHUNK, Q)
                    power += total_t[None, :] - total_s[:, None]
                # (Where t < s it may be large, and is of no use.)
                decay = exp2(tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL))
                pairs = product(x_tile, tl.trans(grad), None, EXACT) * products * decay
                reads, writtens, _, _, _, _ = sum_planes(sums + head * padded + s_begin, plane)
                tl.store(writtens + s, tl.sum(pairs, axis=1))
                tl.store(reads + t, tl.sum(pairs * delta[:, None], axis=0))
    elif role == 1:
        if (s_rows > 0) & (t_rows > 0):
            products = product(B_tile, tl.trans(C_tile), None, EXACT)
            for head in tl.range(first, last, num_stages=STAGES):
                x_tile = tile(x + x_head * head, s, x_row, s_rows, p, head_dim, WHOLE)
                grad = tile(y_grad + y_grad_head * head, t, y_grad_row, t_rows, p, head_dim, WHOLE)
                totals, _, deltas, totals_low, _ = decay_planes(decays + head * padded, plane)
                delta = tl.load(deltas + s_begin + s)
                total_s, end = block_totals(totals + s_begin, s, CHUNK, Q)
                total_t, _ = block_totals(totals + t_begin, t, CHUNK, Q)
                to_end = end - total_s
                if EXACT:
                    total_s, end = block_totals(totals_low + s_begin, s, CHUNK, Q)
                    low, _ = block_totals(totals_low + t_begin, t, CHUNK, Q)
                    total_t += low
                    to_end += end - total_s
                from_start, to_end = exp2(total_t), exp2(to_end)
                pairs = product(x_tile, tl.trans(grad), None, EXACT) * products
                _, _, reads, writtens, _, _ = sum_planes(sums + head * padded, plane)
                written = tl.sum(pairs * from_start[None, :], axis=1) * to_end
                read = tl.sum(pairs * (delta * to_end)[:, None], axis=0) * from_start
                tl.store(writtens + s_begin + s, written)
                tl.store(reads + t_begin + t, read)
    else:
        size = head_dim * states
        inside = tl.minimum(tl.maximum(block, 0), blocks - 1)
        begin = inside.to(tl.int64) * Q
        start_chunk = inside * (Q // CHUNK)
        end_chunk = start_chunk + Q // CHUNK - 1
        starts += (batch * blocks * (Q // CHUNK) + start_chunk) * heads * size
        end_grads += (batch * blocks * (Q // CHUNK) + end_chunk) * heads * size
        through += batch * heads * blocks + inside
        state_place = n[:, None] * head_dim + p[None, :]
        is_state = (n < states)[:, None] & (p < head_dim)[None, :]
        q = tl.arange(0, Q)
        for head in tl.range(first, last, num_stages=STAGES):
            x_tile = tile(x + x_head * head, s, x_row, s_rows, p, head_dim, WHOLE)
            grad = tile(y_grad + y_grad_head * head, t, y_grad_row, t_rows, p, head_dim, WHOLE)
            if WHOLE:
                start = tl.load(starts + head * size + state_place)
                end_grad = tl.load(end_grads + head * size + state_place)
            else:
                start = tl.load(starts + head * size + state_place, mask=is_state, other=0.0)
                end_grad = tl.load(end_grads + head * size + state_place, mask=is_state, other=0.0)
            totals, _, _, totals_low, _ = decay_planes(decays + head * padded, plane)
            _, power = block_totals(totals + begin, q, CHUNK, Q)
            total_t, _ = block_totals(totals + t_begin, t, CHUNK, Q)
            total_s, end = block_totals(totals + s_begin, s, CHUNK, Q)
            to_end = end - total_s
            if EXACT:
                _, low = block_totals(totals_low + begin, q, CHUNK, Q)
                power += low
                low, _ = block_totals(totals_low + t_begin, t, CHUNK, Q)
                total_t += low
                low, end = block_totals(totals_low + s_begin, s, CHUNK, Q)
                to_end += end - low
            decay = exp2(tl.where(inside == block, power, 0.0))
            read = tl.sum(product(C_tile, start, None, EXACT) * grad.to(tl.float32), axis=1)
            written = tl.sum(product(B_tile, end_grad, None, EXACT) * x_tile.to(tl.float32), axis=1)
            passed = tl.sum(tl.sum(start.to(tl.float32) * end_grad.to(tl.float32), axis=1), axis=0)
            _, _, _, _, from_states, to_states = sum_planes(sums + head * padded, plane)
            tl.store(from_states + t_begin + t, read * exp2(total_t) * decay, mask=(t_rows > 0) & (t < Q))
            tl.store(to_states + s_begin + s, written * exp2(to_end) * decay, mask=(s_rows > 0) & (s < Q))
            tl.store(through + head * blocks, passed * decay, mask=inside == block)
