"""The backward of SSD in Triton: the sums that the gradients of decays and Δ are made of, by `delta_kernel`.

They decide how exact dA is. Time is cut into blocks here, of one or two chunks. Pairs of positions in one block or in
neighbouring ones are computed as pairs, of factors that were never rounded; those further apart by way of the states at
the ends of blocks, which are kept in the activations' dtype, and which have decayed through a whole block when they are
read.
"""

import triton
import triton.language as tl

from kernels.ssd.decay_kernels import decay_planes, sum_planes
from kernels.ssd.forward_kernels import once_ahead, product, tile
from kernels.triton_math import exp2


@triton.jit
def from_begin(totals, q, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The logarithms of decays from a block's beginning up to q, from the totals of its chunks."""
    total = tl.load(totals + q)
    for chunk in tl.static_range(1, CHUNKS):
        total += tl.where(q >= chunk * CHUNK, tl.load(totals + chunk * CHUNK - 1), 0.0)
    return total


@triton.jit
def to_chunk(totals, s, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The same from positions s of a block up to where its chunk CHUNKS begins; less what is after that in it."""
    total = -tl.load(totals + s)
    for chunk in tl.static_range(0, CHUNKS):
        total += tl.where(s < (chunk + 1) * CHUNK, tl.load(totals + (chunk + 1) * CHUNK - 1), 0.0)
    return total


@triton.jit
def pairs_in_block(
    y_grad,
    x,
    B,
    C,
    decays,
    sums,
    own_products,
    y_grad_row,
    y_grad_head,
    x_row,
    x_head,
    B_row,
    C_row,
    rows,
    head_dim,
    states,
    padded,
    plane,
    first,
    last,
    wants_own,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVES: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What chunk HALF of a block reads (t) of what it and those before it in the block wrote (s), head after head.

    All pointers are to where the block begins, of the first head; rows: of the block and after it.
    """
    s, t, n, p = tl.arange(0, (HALF + 1) * CHUNK), tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, P)
    at: tl.constexpr = HALF * CHUNK
    C += at * C_row
    y_grad += at * y_grad_row
    B_tile = tile(B, s, B_row, rows, n, states, WHOLE)
    C_tile = tile(C, t, C_row, rows - at, n, states, WHOLE)
    products = product(B_tile, tl.trans(C_tile), None, EXACT)
    distance = at + t[None, :] - s[:, None]
    if wants_own:
        tl.store(own_products + at + t, tl.sum(tl.where(distance == 0, products, 0.0), axis=0))
    products = tl.where(distance > 0, products, 0.0)
    for head in tl.range(first, last, num_stages=STAGES):
        x_tile = tile(x + x_head * head, s, x_row, rows, p, head_dim, WHOLE)
        grad = tile(y_grad + y_grad_head * head, t, y_grad_row, rows - at, p, head_dim, WHOLE)
        once_ahead(x_tile)
        once_ahead(grad)
        totals, _, deltas, ages, totals_low, _ = decay_planes(decays + head * padded, plane)
        delta = tl.load(deltas + s)
        power = to_chunk(totals, s, CHUNK, HALF)[:, None] + tl.load(totals + at + t)[None, :]
        if EXACT:
            power += to_chunk(totals_low, s, CHUNK, HALF)[:, None]
            power += tl.load(totals_low + at + t)[None, :]
        age = to_chunk(ages, s, CHUNK, HALF)[:, None] + tl.load(ages + at + t)[None, :]
        # (Where t < s the power may be large, and is of no use.)
        decay = exp2(tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL))
        pairs = product(x_tile, tl.trans(grad), None, EXACT) * products * decay
        written, aged = tl.sum(pairs, axis=1), tl.sum(pairs * age, axis=1)
        read = tl.sum(pairs * delta[:, None], axis=0)
        reads, _, writtens, _, written_ages, _, _ = sum_planes(sums + head * padded, plane, HALVES)
        tl.store(reads + at + t, read)
        tl.store(writtens + HALF * plane + s, written)
        tl.store(written_ages + HALF * plane + s, aged)


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
    HALVES: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What pairs of positions and states add to the loss, head after head of a part of a group.

    starts, end_grads: what `states_kernel` left, of chunks. sums (plane, batch, head, padded), own_products (batch,
    group, padded), through (batch, head, block), all fp32, are for `delta_kernel`. A block has HALVES chunks; padded is
    the length in whole blocks. What goes by way of states comes without the decays on its way: `delta_kernel` puts them
    in.
    Programs: batch x blocks x groups x parts x (2 HALVES + 3), the last fastest: what each chunk of a block reads of
    the block up to it, and of the block before; what the block reads of the state before that; what it writes to the
    state after the next block; what passes through it.
    """
    Q: tl.constexpr = HALVES * CHUNK
    roles: tl.constexpr = 2 * HALVES + 3
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    groups = heads // group_heads
    pid = tl.program_id(0)
    role = pid % roles
    part = pid // roles % parts
    group = pid // roles // parts % groups
    block = pid // roles // parts // groups % blocks
    batch = (pid // roles // parts // groups // blocks).to(tl.int64)
    batches = tl.num_programs(0) // (roles * parts * groups * blocks)
    first = group * group_heads + part * part_heads
    last = min(first + part_heads, (group + 1) * group_heads)
    x_row, y_grad_row, B_row, C_row = x_row * ALIGN, y_grad_row * ALIGN, B_row * ALIGN, C_row * ALIGN
    x_head, y_grad_head = x_head.to(tl.int64) * ALIGN, y_grad_head.to(tl.int64) * ALIGN
    x += batch * x_batch * ALIGN
    y_grad += batch * y_grad_batch * ALIGN
    B += batch * B_batch * ALIGN + group.to(tl.int64) * B_group * ALIGN
    C += batch * C_batch * ALIGN + group.to(tl.int64) * C_group * ALIGN
    padded = blocks.to(tl.int64) * Q
    plane = batches * heads * padded
    decays += batch * heads * padded
    sums += batch * heads * padded
    begin = block.to(tl.int64) * Q
    n, p = tl.arange(0, N), tl.arange(0, P)
    size = head_dim * states
    state_place = n[:, None] * head_dim + p[None, :]
    is_state = (n < states)[:, None] & (p < head_dim)[None, :]

    if role < HALVES:
        for half in tl.static_range(0, HALVES):
            if role == half:
                pairs_in_block(
                    *(y_grad + begin * y_grad_row, x + begin * x_row, B + begin * B_row, C + begin * C_row),
                    *(decays + begin, sums + begin, own_products + (batch * groups + group) * padded + begin),
                    *(y_grad_row, y_grad_head, x_row, x_head, B_row, C_row, (length - begin).to(tl.int32)),
                    *(head_dim, states, padded, plane, first, last, part == 0),
                    *(WHOLE, EXACT, half, CHUNK, HALVES, P, N, STAGES),
                )
    elif role < 2 * HALVES:
        # What chunk `half` of the block reads (t) of what the block before wrote (s).
        if block > 0:
            half = role - HALVES
            s, t = tl.arange(0, Q), tl.arange(0, CHUNK)
            s_begin, t_begin = begin - Q, begin + half * CHUNK
            t_rows = (length - t_begin).to(tl.int32)
            x += s_begin * x_row
            y_grad += t_begin * y_grad_row
            B_tile = tile(B + s_begin * B_row, s, B_row, Q, n, states, WHOLE)
            C_tile = tile(C + t_begin * C_row, t, C_row, t_rows, n, states, WHOLE)
            products = product(B_tile, tl.trans(C_tile), None, EXACT)
            of_half = half * plane + s_begin + s
            for head in tl.range(first, last, num_stages=STAGES):
                x_tile = tile(x + x_head * head, s, x_row, Q, p, head_dim, WHOLE)
                grad = tile(y_grad + y_grad_head * head, t, y_grad_row, t_rows, p, head_dim, WHOLE)
                once_ahead(x_tile)
                once_ahead(grad)
                totals, _, deltas, _, totals_low, _ = decay_planes(decays + head * padded, plane)
                delta = tl.load(deltas + s_begin + s)
                from_start = from_begin(totals + begin, half * CHUNK + t, CHUNK, HALVES)
                to_end = to_chunk(totals + s_begin, s, CHUNK, HALVES)
                if EXACT:
                    from_start += from_begin(totals_low + begin, half * CHUNK + t, CHUNK, HALVES)
                    to_end += to_chunk(totals_low + s_begin, s, CHUNK, HALVES)
                from_start, to_end = exp2(from_start), exp2(to_end)
                pairs = product(x_tile, tl.trans(grad), None, EXACT) * products
                written = tl.sum(pairs * from_start[None, :], axis=1) * to_end
                read = tl.sum(pairs * (delta * to_end)[:, None], axis=0) * from_start
                _, near_reads, _, near_writtens, _, _, _ = sum_planes(sums + head * padded, plane, HALVES)
                tl.store(near_reads + t_begin + t, read)
                tl.store(near_writtens + of_half, written)
    elif role < 2 * HALVES + 2:
        # What is read of the state before the last block, or written to that after the next one.
        is_write = role > 2 * HALVES
        other = tl.where(is_write, tl.minimum(block + 1, blocks - 1), tl.maximum(block - 1, 0))
        chunk = other * HALVES + tl.where(is_write, HALVES - 1, 0)
        carried = tl.where(is_write, end_grads, starts) + (batch * blocks * HALVES + chunk) * heads * size
        rows, columns = tl.where(is_write, x, y_grad), tl.where(is_write, B, C)
        row, column_row = tl.where(is_write, x_row, y_grad_row), tl.where(is_write, B_row, C_row)
        row_head = tl.where(is_write, x_head, y_grad_head)
        remaining = (length - begin).to(tl.int32)
        q = tl.arange(0, Q)
        rows += begin * row
        columns_tile = tile(columns + begin * column_row, q, column_row, remaining, n, states, WHOLE)
        for head in tl.range(first, last, num_stages=STAGES):
            rows_tile = tile(rows + row_head * head, q, row, remaining, p, head_dim, WHOLE)
            if WHOLE:
                state = tl.load(carried + head * size + state_place)
            else:
                state = tl.load(carried + head * size + state_place, mask=is_state, other=0.0)
            once_ahead(state)
            found = tl.sum(product(columns_tile, state, None, EXACT) * rows_tile.to(tl.float32), axis=1)
            _, _, _, _, _, from_states, to_states = sum_planes(sums + head * padded, plane, HALVES)
            tl.store(tl.where(is_write, to_states, from_states) + begin + q, found)
    else:
        starts += (batch * blocks + block) * HALVES * heads * size
        end_grads += ((batch * blocks + block) * HALVES + HALVES - 1) * heads * size
        for head in tl.range(first, last, num_stages=STAGES):
            if WHOLE:
                start = tl.load(starts + head * size + state_place)
                end_grad = tl.load(end_grads + head * size + state_place)
            else:
                start = tl.load(starts + head * size + state_place, mask=is_state, other=0.0)
                end_grad = tl.load(end_grads + head * size + state_place, mask=is_state, other=0.0)
            passed = tl.sum(start.to(tl.float32) * end_grad.to(tl.float32))
            tl.store(through + (batch * heads + head) * blocks + block, passed)
