"""SSD in Triton: products that walk through time. `decay_kernels.py` explains decays and the names of axes."""

import triton
import triton.language as tl

from kernels.ssd.decay_kernels import decay_planes
from kernels.triton_math import INTERPRETED, exp2, sigmoid


@triton.jit
def tile(place, row, row_stride, rows, column, columns, WHOLE: tl.constexpr):
    """(row, column) of a matrix with neighbouring columns, 0 outside of it. WHOLE: no column lies outside."""
    mask = (row < rows)[:, None]
    if not WHOLE:
        mask = mask & (column < columns)[None, :]
    return tl.load(place + (row[:, None] * row_stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def once_ahead(tile):
    """Nothing, but a second use of a tile that a loop loads for matrix products, and that need not be there after it.

    For one that only matrix products use, Triton 3.6 keeps a buffer more than loads ahead need: for products that still
    run when the next iteration loads. Without it two programs with three stages fit on a multiprocessor of an H100.
    """
    if not INTERPRETED and tile.dtype.primitive_bitwidth == 16:
        zeros = (tile.to(tl.int16, bitcast=True) & 1) & 2  # which LLVM knows, and so reads nothing
        tl.inline_asm_elementwise("", "=r,r", [zeros], dtype=tl.int16, is_pure=False, pack=2)


@triton.jit
def product(a, b, total, EXACT: tl.constexpr):
    """The matrix product a·b + total in fp32; of EXACT fp32 factors by three tf32 products, which lose no more."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)  # the interpreter multiplies no bf16
    return tl.dot(a, b, total, input_precision="tf32x3" if EXACT else "tf32")


@triton.jit(
    do_not_specialize=[
        *("x_batch", "x_row", "x_head", "B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
        *("z_batch", "z_row", "z_head", "length", "heads", "group_heads", "head_dim", "states", "chunks"),
        *("segments", "segment_chunks"),
    ]
)
def forward_kernel(
    x,
    B,
    C,
    D,
    z,
    decays,
    starts,
    before,
    y,
    ungated,
    final_state,
    carried,
    x_batch,
    x_row,
    x_head,
    B_batch,
    B_row,
    B_group,
    C_batch,
    C_row,
    C_group,
    z_batch,
    z_row,
    z_head,
    length,
    heads,
    group_heads,
    head_dim,
    states,
    chunks,
    segments,
    segment_chunks,
    WIDE_SKIP: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of one head (of P of its channels) in a segment of the sequence, chunk after chunk, the state in registers.

    starts (batch, segment, head, head_dim, state) fp32: the states before the segments, or None where there is one
    segment that starts from 0. before: y of other states in fp32, which is added, None for none; may be y itself.
    carried (batch, chunk, head, state, head_dim), or None: gets the states before chunks, as from `states_kernel`.
    The strides of x, B, C, z and head_dim and states are given in units of ALIGN, which tells the compiler how wide its
    loads may be.
    Programs: batch x segments x heads x (head_dim / P), the last fastest.
    """
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    parts = tl.cdiv(head_dim, P)
    pid = tl.program_id(0)
    head = pid // parts % heads
    segment = pid // parts // heads % segments
    batch = (pid // parts // heads // segments).to(tl.int64)
    group = head // group_heads
    q, n = tl.arange(0, Q), tl.arange(0, N)
    p = pid % parts * P + tl.arange(0, P)
    x += batch * x_batch * ALIGN + head.to(tl.int64) * x_head * ALIGN
    B += batch * B_batch * ALIGN + group.to(tl.int64) * B_group * ALIGN
    C += batch * C_batch * ALIGN + group.to(tl.int64) * C_group * ALIGN
    x_row, B_row, C_row, y_row = x_row * ALIGN, B_row * ALIGN, C_row * ALIGN, heads * head_dim
    y += batch * length * y_row + head * head_dim
    if before is not None:
        before += batch * length * y_row + head * head_dim
    if z is not None:
        z += batch * z_batch * ALIGN + head.to(tl.int64) * z_head * ALIGN
        z_row = z_row * ALIGN
    if ungated is not None:
        ungated += batch * length * y_row + head * head_dim
    padded = chunks.to(tl.int64) * Q
    plane = tl.num_programs(0) // (parts * segments) * padded
    totals, origins, _, _, totals_low, origins_low = decay_planes(decays + (batch * heads + head) * padded, plane)

    is_state = (n < states)[:, None] & (p < head_dim)[None, :]
    state_place = p[None, :] * states + n[:, None]
    state = tl.zeros([N, P], tl.float32)
    if starts is not None:
        start = starts + ((batch * segments + segment) * heads + head) * head_dim * states
        state = tl.load(start + state_place, mask=is_state, other=0.0)
    if D is not None:
        if WIDE_SKIP:
            skip = tl.load(D + head * head_dim + p, mask=p < head_dim, other=0.0).to(tl.float32)[None, :]
        else:
            skip = tl.load(D + head).to(tl.float32)
    is_before = q[:, None] >= q[None, :]

    first = segment * segment_chunks
    if carried is not None:
        size = head_dim * states
        carried += ((batch * chunks + first) * heads + head) * size
    begin = first.to(tl.int64) * Q
    for chunk in tl.range(first, min(first + segment_chunks, chunks), num_stages=STAGES):
        rows = length - chunk * Q
        if carried is not None:
            place = carried + (n[:, None] * head_dim + p[None, :])
            if WHOLE:
                tl.store(place, state.to(carried.dtype.element_ty))
            else:
                tl.store(place, state.to(carried.dtype.element_ty), mask=is_state)
            carried += heads.to(tl.int64) * size
        C_tile = tile(C + begin * C_row, q, C_row, rows, n, states, WHOLE)
        B_tile = tile(B + begin * B_row, q, B_row, rows, n, states, WHOLE)
        x_tile = tile(x + begin * x_row, q, x_row, rows, p, head_dim, WHOLE)
        once_ahead(C_tile)
        once_ahead(B_tile)
        total, origin = tl.load(totals + begin + q), tl.load(origins + begin + q)
        end = tl.load(totals + begin + Q - 1)
        power, from_start, to_end, through = total[:, None] - origin[None, :], total, end - origin, end
        if EXACT:
            total, origin = tl.load(totals_low + begin + q), tl.load(origins_low + begin + q)
            end = tl.load(totals_low + begin + Q - 1)
            power += total[:, None] - origin[None, :]
            from_start, to_end, through = from_start + total, to_end + (end - origin), through + end

        decay = exp2(tl.where(is_before, power, float("-inf")))
        scores = product(C_tile, tl.trans(B_tile), None, EXACT) * decay
        out = product(C_tile, state.to(x_tile.dtype), None, EXACT) * exp2(from_start)[:, None]
        out = product(scores.to(x_tile.dtype), x_tile, out, EXACT)

        written = (x_tile.to(tl.float32) * exp2(to_end)[:, None]).to(x_tile.dtype)
        state = product(tl.trans(B_tile), written, state * exp2(through), EXACT)

        if D is not None:
            out += skip * x_tile.to(tl.float32)
        is_out = (q < rows)[:, None]
        if not WHOLE:
            is_out = is_out & (p < head_dim)[None, :]
        target = q[:, None] * y_row + p[None, :]
        if before is not None:
            out += tl.load(before + begin * y_row + target, mask=is_out, other=0.0)
        if z is not None:
            if ungated is not None:
                tl.store(ungated + begin * y_row + target, out.to(ungated.dtype.element_ty), mask=is_out)
            gate = tile(z + begin * z_row, q, z_row, rows, p, head_dim, WHOLE).to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(y + begin * y_row + target, out.to(y.dtype.element_ty), mask=is_out)
        begin += Q

    if final_state is not None:  # noqa: SIM102  that is known at compile time
        if segment == segments - 1:
            final_state += (batch * heads + head) * head_dim * states
            tl.store(final_state + state_place, state, mask=is_state)


@triton.jit(
    do_not_specialize=[
        *("x_batch", "x_row", "x_head", "B_batch", "B_row", "B_group"),
        *("y_grad_batch", "y_grad_row", "y_grad_head", "C_batch", "C_row", "C_group"),
        *("length", "heads", "group_heads", "head_dim", "states", "chunks", "segments", "segment_chunks"),
    ]
)
def states_kernel(
    x,
    B,
    y_grad,
    C,
    decays,
    first,
    last_grad,
    starts,
    end_grads,
    ends,
    powers,
    x_batch,
    x_row,
    x_head,
    B_batch,
    B_row,
    B_group,
    y_grad_batch,
    y_grad_row,
    y_grad_head,
    C_batch,
    C_row,
    C_group,
    length,
    heads,
    group_heads,
    head_dim,
    states,
    chunks,
    segments,
    segment_chunks,
    BOTH: tl.constexpr,
    BACK: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What is carried between chunks: the states before each and, walking back, the gradients of those after each.

    BOTH: half of the programs walk forward, from x, B and `first` (None for 0) to `starts`; the others back, from
    y_grad, C and `last_grad` (None for 0) to `end_grads` and `ends`, the gradient of `first` (None where it is not
    wanted). starts, end_grads: (batch, chunk, head, state, head_dim); first, last_grad, ends: (batch, head, head_dim,
    state) fp32. With BACK, too, all walk back.
    Otherwise all walk forward, each through a segment of the sequence, from 0: `ends` (batch, segment, head, head_dim,
    state) are the states there, powers (batch, segment, head) the logarithms of the segments' decays.
    Strides, head_dim and states in units of ALIGN.
    Programs: (2 if BOTH and not BACK) x batch x segments x heads x (states / N) x (head_dim / P), the last fastest.
    """
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    p_parts, n_parts = tl.cdiv(head_dim, P), tl.cdiv(states, N)
    programs = tl.num_programs(0)
    rows, columns, outputs = x, B, starts
    pid, is_back = tl.program_id(0), False
    if BOTH:
        if BACK:
            is_back = pid >= 0
        else:
            programs = programs // 2
            is_back, pid = pid >= programs, pid % programs
        rows, columns, outputs = (
            tl.where(is_back, y_grad, x),
            tl.where(is_back, C, B),
            tl.where(is_back, end_grads, starts),
        )
        x_batch, x_row = tl.where(is_back, y_grad_batch, x_batch), tl.where(is_back, y_grad_row, x_row)
        x_head, B_group = tl.where(is_back, y_grad_head, x_head), tl.where(is_back, C_group, B_group)
        B_batch, B_row = tl.where(is_back, C_batch, B_batch), tl.where(is_back, C_row, B_row)
    head = pid // p_parts // n_parts % heads
    segment = pid // p_parts // n_parts // heads % segments
    batch = (pid // p_parts // n_parts // heads // segments).to(tl.int64)
    group = head // group_heads
    q = tl.arange(0, Q)
    n = pid // p_parts % n_parts * N + tl.arange(0, N)
    p = pid % p_parts * P + tl.arange(0, P)
    rows += batch * x_batch * ALIGN + head.to(tl.int64) * x_head * ALIGN
    columns += batch * B_batch * ALIGN + group.to(tl.int64) * B_group * ALIGN
    x_row, B_row = x_row * ALIGN, B_row * ALIGN
    padded = chunks.to(tl.int64) * Q
    plane = programs // (p_parts * n_parts * segments) * padded
    totals, origins, _, _, totals_low, origins_low = decay_planes(decays + (batch * heads + head) * padded, plane)

    is_state = (n < states)[:, None] & (p < head_dim)[None, :]
    size = head_dim * states
    state_place = p[None, :] * states + n[:, None]
    walk = (batch * segments + segment) * heads + head
    carry = tl.zeros([N, P], tl.float32)
    if first is not None:
        carry = tl.load(first + walk * size + state_place, mask=is_state & (is_back == 0), other=0.0)
    if last_grad is not None:
        carry += tl.load(last_grad + walk * size + state_place, mask=is_state & is_back, other=0.0)

    begin_chunk, end_chunk = segment * segment_chunks, min((segment + 1) * segment_chunks, chunks)
    number, step = begin_chunk, 1
    if BOTH:
        number, step = tl.where(is_back, end_chunk - 1, begin_chunk), tl.where(is_back, -1, 1)
        target = outputs + ((batch * chunks + number) * heads + head) * size
        target_step = heads.to(tl.int64) * size * step
    begin = number.to(tl.int64) * Q
    all_power = 0.0
    for _ in tl.range(begin_chunk, end_chunk, num_stages=STAGES):
        remaining = (length - begin).to(tl.int32)
        rows_tile = tile(rows + begin * x_row, q, x_row, remaining, p, head_dim, WHOLE)
        columns_tile = tile(columns + begin * B_row, q, B_row, remaining, n, states, WHOLE)
        end = tl.load(totals + begin + Q - 1)
        power = end - tl.load(origins + begin + q)
        if BOTH:
            power = tl.where(is_back, tl.load(totals + begin + q), power)
        if EXACT:
            low = tl.load(totals_low + begin + Q - 1)
            end += low
            low -= tl.load(origins_low + begin + q)
            if BOTH:
                low = tl.where(is_back, tl.load(totals_low + begin + q), low)
            power += low
        if BOTH:
            place = target + (n[:, None] * head_dim + p[None, :])
            if WHOLE:
                tl.store(place, carry.to(starts.dtype.element_ty))
            else:
                tl.store(place, carry.to(starts.dtype.element_ty), mask=is_state)
            target += target_step
        else:
            all_power += end
        weighted = (rows_tile.to(tl.float32) * exp2(power)[:, None]).to(rows_tile.dtype)
        carry = product(tl.trans(columns_tile), weighted, carry * exp2(end), EXACT)
        begin += Q * step
    if BOTH:
        if ends is not None:
            tl.store(ends + walk * size + state_place, carry, mask=is_state & is_back)
    else:
        tl.store(ends + walk * size + state_place, carry, mask=is_state)
        tl.store(powers + walk, all_power)


@triton.jit(do_not_specialize=["heads", "size", "segments"])
def segments_kernel(ends, first_carry, powers, heads, size, segments, BLOCK: tl.constexpr):
    """Where segments begin, from where each would end if it began at 0: `ends` (batch, segment, head, size), in place.

    first_carry: (batch, head, size) fp32, None for 0; powers: (batch, segment, head), the logarithms of what decays.
    Programs: (batch x heads, size / BLOCK).
    """
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    carry = tl.zeros([BLOCK], tl.float32)
    if first_carry is not None:
        carry = tl.load(first_carry + (batch * heads + head) * size + element, mask=mask, other=0.0)
    for segment in range(0, segments):
        walk = (batch * segments + segment) * heads + head
        power, end = tl.load(powers + walk), tl.load(ends + walk * size + element, mask=mask, other=0.0)
        tl.store(ends + walk * size + element, carry, mask=mask)
        carry = carry * exp2(power) + end
