"""SSD in Triton: the kernels. `launch.py` launches them, docs/kernels.md explains them.

Decays are powers of 2. What decays on the way from position s to t of a chunk, times Δ[s], is
exp2(total[t] - origin[s]) with total the sum of the logarithms from the chunk's beginning and origin = total - log2(Δ).
A document that begins is a decay of `GONE`, and no step counts as a stronger one: so what one fp32 number loses of a
total is of no weight beside the rounding of 16-bit activations. For fp32 ones totals are EXACT: two fp32 numbers.

Axes: rows of a chunk q (t where they read, s where they write), head_dim p, state n. `padded`: length in whole chunks.
"""

import triton
import triton.language as tl

from kernels.triton_math import INTERPRETED, clamp, sigmoid, softplus

LOG2_E = tl.constexpr(1.4426950408889634)
GONE = tl.constexpr(-160.0)  # as a power of 2: fp32 has nothing that small
TOTAL, ORIGIN, DELTA, TOTAL_LOW, ORIGIN_LOW = (tl.constexpr(plane) for plane in range(5))  # of `decays`
READ, WRITTEN, FROM_STATE, TO_STATE, DELTA_GRAD, OWN = (tl.constexpr(plane) for plane in range(6))  # of `sums`


@triton.jit(do_not_specialize=["dt_batch", "dt_row", "dt_head", "seq_batch", "seq_row", "length", "heads", "chunks"])
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
    target = decays + (batch * heads + head)[None, :] * padded + t[:, None]
    is_head = (head < heads)[None, :]
    tl.store(target + TOTAL * plane, total.to(tl.float32), mask=is_head)
    tl.store(target + ORIGIN * plane, origin.to(tl.float32), mask=is_head)
    tl.store(target + DELTA * plane, delta, mask=is_head)
    if EXACT:
        tl.store(target + TOTAL_LOW * plane, rounded_off(total), mask=is_head)
        tl.store(target + ORIGIN_LOW * plane, rounded_off(origin), mask=is_head)


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
def tile(place, row, row_stride, rows, column, columns, WHOLE: tl.constexpr):
    """(row, column) of a matrix with neighbouring columns, 0 outside of it. WHOLE: no column lies outside."""
    mask = (row < rows)[:, None]
    if not WHOLE:
        mask = mask & (column < columns)[None, :]
    return tl.load(place + (row[:, None] * row_stride + column[None, :]), mask=mask, other=0.0)


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
    y,
    ungated,
    final_state,
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
    segment that starts from 0. The strides of x, B, C, z and head_dim and states are given in units of ALIGN, which
    tells the compiler how wide its loads may be.
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
    if z is not None:
        z += batch * z_batch * ALIGN + head.to(tl.int64) * z_head * ALIGN
        z_row = z_row * ALIGN
    if ungated is not None:
        ungated += batch * length * y_row + head * head_dim
    padded = chunks.to(tl.int64) * Q
    plane = tl.num_programs(0) // (parts * segments) * padded
    decays += (batch * heads + head) * padded

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
    begin = first.to(tl.int64) * Q
    for chunk in tl.range(first, min(first + segment_chunks, chunks), num_stages=STAGES):
        rows = length - chunk * Q
        C_tile = tile(C + begin * C_row, q, C_row, rows, n, states, WHOLE)
        B_tile = tile(B + begin * B_row, q, B_row, rows, n, states, WHOLE)
        x_tile = tile(x + begin * x_row, q, x_row, rows, p, head_dim, WHOLE)
        here = decays + begin
        total, origin = tl.load(here + TOTAL * plane + q), tl.load(here + ORIGIN * plane + q)
        end = tl.load(here + TOTAL * plane + Q - 1)
        power, from_start, to_end, through = total[:, None] - origin[None, :], total, end - origin, end
        if EXACT:
            total, origin = tl.load(here + TOTAL_LOW * plane + q), tl.load(here + ORIGIN_LOW * plane + q)
            end = tl.load(here + TOTAL_LOW * plane + Q - 1)
            power += total[:, None] - origin[None, :]
            from_start, to_end, through = from_start + total, to_end + (end - origin), through + end

        decay = tl.exp2(tl.where(is_before, power, float("-inf")))
        scores = product(C_tile, tl.trans(B_tile), None, EXACT) * decay
        out = product(C_tile, state.to(x_tile.dtype), None, EXACT) * tl.exp2(from_start)[:, None]
        out = product(scores.to(x_tile.dtype), x_tile, out, EXACT)

        written = (x_tile.to(tl.float32) * tl.exp2(to_end)[:, None]).to(x_tile.dtype)
        state = product(tl.trans(B_tile), written, state * tl.exp2(through), EXACT)

        if D is not None:
            out += skip * x_tile.to(tl.float32)
        is_out = (q < rows)[:, None]
        if not WHOLE:
            is_out = is_out & (p < head_dim)[None, :]
        target = q[:, None] * y_row + p[None, :]
        if z is not None:
            if ungated is not None:
                tl.store(ungated + begin * y_row + target, out.to(ungated.dtype.element_ty), mask=is_out)
            gate = tile(z + begin * z_row, q, z_row, rows, p, head_dim, WHOLE).to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(y + begin * y_row + target, out.to(y.dtype.element_ty), mask=is_out)
        begin += Q

    if segment == segments - 1:
        final_state += (batch * heads + head) * head_dim * states
        tl.store(final_state + state_place, state, mask=is_state)


@triton.jit(
    do_not_specialize=[
        *("rows_batch", "rows_row", "rows_head", "columns_batch", "columns_row", "columns_group"),
        *("length", "heads", "group_heads", "head_dim", "states", "chunks", "segments", "segment_chunks"),
    ]
)
def states_kernel(
    rows,
    columns,
    decays,
    first_carry,
    carries,
    last_carry,
    powers,
    rows_batch,
    rows_row,
    rows_head,
    columns_batch,
    columns_row,
    columns_group,
    length,
    heads,
    group_heads,
    head_dim,
    states,
    chunks,
    segments,
    segment_chunks,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What is carried between chunks: states before each (rows x, columns B), or gradients of those after each.

    The latter in REVERSE, with rows dy and columns C. first_carry, last_carry (batch, head, head_dim, state) fp32:
    where the walk begins, where it ends; None for 0, and for what no one needs. carries: (batch, chunk, head, state,
    head_dim). Without carries, the walk is one of a segment of the sequence that begins at 0: last_carry
    (batch, segment, head, head_dim, state) is where it ends, powers (batch, segment, head) the logarithm of its decay.
    Strides, head_dim and states in units of ALIGN.
    Programs: batch x segments x heads x (states / N) x (head_dim / P), the last fastest.
    """
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    p_parts, n_parts = tl.cdiv(head_dim, P), tl.cdiv(states, N)
    pid = tl.program_id(0)
    head = pid // p_parts // n_parts % heads
    segment = pid // p_parts // n_parts // heads % segments
    batch = (pid // p_parts // n_parts // heads // segments).to(tl.int64)
    group = head // group_heads
    q = tl.arange(0, Q)
    n = pid // p_parts % n_parts * N + tl.arange(0, N)
    p = pid % p_parts * P + tl.arange(0, P)
    rows += batch * rows_batch * ALIGN + head.to(tl.int64) * rows_head * ALIGN
    columns += batch * columns_batch * ALIGN + group.to(tl.int64) * columns_group * ALIGN
    rows_row, columns_row = rows_row * ALIGN, columns_row * ALIGN
    padded = chunks.to(tl.int64) * Q
    plane = tl.num_programs(0) // (p_parts * n_parts * segments) * padded
    decays += (batch * heads + head) * padded

    is_state = (n < states)[:, None] & (p < head_dim)[None, :]
    size = head_dim * states
    state_place = p[None, :] * states + n[:, None]
    walk = (batch * segments + segment) * heads + head
    carry = tl.zeros([N, P], tl.float32)
    if first_carry is not None:
        carry = tl.load(first_carry + walk * size + state_place, mask=is_state, other=0.0)

    step = -1 if REVERSE else 1
    first, last = segment * segment_chunks, min((segment + 1) * segment_chunks, chunks)
    number = last - 1 if REVERSE else first
    begin = number.to(tl.int64) * Q
    if carries is not None:
        target = carries + ((batch * chunks + number) * heads + head) * size
        target_step = heads.to(tl.int64) * size * step
    all_power = 0.0
    for _ in tl.range(first, last, num_stages=STAGES):
        remaining = (length - begin).to(tl.int32)
        rows_tile = tile(rows + begin * rows_row, q, rows_row, remaining, p, head_dim, WHOLE)
        columns_tile = tile(columns + begin * columns_row, q, columns_row, remaining, n, states, WHOLE)
        here = decays + begin
        end = tl.load(here + TOTAL * plane + Q - 1)
        if REVERSE:
            power = tl.load(here + TOTAL * plane + q)
            if EXACT:
                power += tl.load(here + TOTAL_LOW * plane + q)
        else:
            power = end - tl.load(here + ORIGIN * plane + q)
            if EXACT:
                power += tl.load(here + TOTAL_LOW * plane + Q - 1) - tl.load(here + ORIGIN_LOW * plane + q)
        if EXACT:
            end += tl.load(here + TOTAL_LOW * plane + Q - 1)
        if carries is not None:
            place = target + (n[:, None] * head_dim + p[None, :])
            if WHOLE:
                tl.store(place, carry.to(carries.dtype.element_ty))
            else:
                tl.store(place, carry.to(carries.dtype.element_ty), mask=is_state)
            target += target_step
        else:
            all_power += end
        weighted = (rows_tile.to(tl.float32) * tl.exp2(power)[:, None]).to(rows_tile.dtype)
        carry = product(tl.trans(columns_tile), weighted, carry * tl.exp2(end), EXACT)
        begin += Q * step
    if last_carry is not None:
        tl.store(last_carry + walk * size + state_place, carry, mask=is_state)
    if carries is None:
        tl.store(powers + walk, all_power)


@triton.jit(do_not_specialize=["heads", "size", "segments"])
def segments_kernel(first_carry, ends, powers, heads, size, segments, BLOCK: tl.constexpr):
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
        carry = carry * tl.exp2(power) + end


@triton.jit(
    do_not_specialize=[
        *("y_grad_batch", "y_grad_row", "y_grad_head", "x_batch", "x_row", "x_head"),
        *("B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
        *("x_grad_batch", "x_grad_row", "BC_grad_part", "BC_grad_batch", "BC_grad_row"),
        *("length", "heads", "group_heads", "head_dim", "states", "chunks", "parts", "part_heads"),
    ]
)
def gradients_kernel(
    y_grad,
    x,
    B,
    C,
    D,
    decays,
    starts,
    end_grads,
    x_grad,
    B_grad,
    C_grad,
    sums,
    through,
    D_parts,
    scratch,
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
    x_grad_batch,
    x_grad_row,
    BC_grad_part,
    BC_grad_batch,
    BC_grad_row,
    length,
    heads,
    group_heads,
    head_dim,
    states,
    chunks,
    parts,
    part_heads,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk, head after head of a part of a group, those of B and C summed in registers.

    starts, end_grads: what `states_kernel` left. x_grad like x and, of equal strides, B_grad and C_grad (part, batch,
    length, group, state), with neighbouring heads and groups;
    sums: (plane, batch, head, padded) fp32, see below; through (batch, head, chunk) fp32; D_parts (batch, chunk, head,
    head_dim) fp32, None unless D is per channel; scratch (program, Q, Q) fp32.
    Programs: batch x chunks x groups x parts, the last fastest.
    """
    head_dim = head_dim * ALIGN
    states = states * ALIGN
    groups = heads // group_heads
    pid = tl.program_id(0)
    part = pid % parts
    group = pid // parts % groups
    chunk = pid // parts // groups % chunks
    batch = (pid // parts // groups // chunks).to(tl.int64)
    batches = tl.num_programs(0) // (parts * groups * chunks)
    s, t, n, p = tl.arange(0, Q), tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    begin = chunk.to(tl.int64) * Q
    rows = length - chunk * Q
    x_row, y_grad_row, x_grad_row = x_row * ALIGN, y_grad_row * ALIGN, x_grad_row * ALIGN
    B_row, C_row = B_row * ALIGN, C_row * ALIGN
    B += batch * B_batch * ALIGN + group.to(tl.int64) * B_group * ALIGN + begin * B_row
    C += batch * C_batch * ALIGN + group.to(tl.int64) * C_group * ALIGN + begin * C_row
    B_tile = tile(B, s, B_row, rows, n, states, WHOLE)
    C_tile = tile(C, t, C_row, rows, n, states, WHOLE)
    # (s, t), by way of memory: a product that others are computed from is given a layout that suits none of them.
    place = scratch + pid.to(tl.int64) * (Q * Q) + s[:, None] * Q + t[None, :]
    tl.store(place, product(B_tile, tl.trans(C_tile), None, EXACT))
    tl.debug_barrier()
    products = tl.load(place)
    is_own, is_later = t[None, :] == s[:, None], t[None, :] > s[:, None]
    own_product = tl.sum(tl.where(is_own, products, 0.0), axis=1)

    first = group * group_heads + part * part_heads
    last = min(first + part_heads, (group + 1) * group_heads)
    x += batch * x_batch * ALIGN + begin * x_row
    y_grad += batch * y_grad_batch * ALIGN + begin * y_grad_row
    x_grad += batch * x_grad_batch * ALIGN + begin * x_grad_row
    padded = chunks.to(tl.int64) * Q
    plane = batches * heads * padded
    decays += batch * heads * padded + begin
    sums += batch * heads * padded + begin
    size = head_dim * states
    starts += (batch * chunks + chunk) * heads * size
    end_grads += (batch * chunks + chunk) * heads * size
    through += batch * heads * chunks + chunk
    state_place = n[:, None] * head_dim + p[None, :]
    is_state = (n < states)[:, None] & (p < head_dim)[None, :]
    is_x = (s < rows)[:, None] & (p < head_dim)[None, :]

    # What the positions wrote.
    B_sum = tl.zeros([Q, N], tl.float32)
    products_grad = tl.zeros([Q, Q], tl.float32)
    own_product_grad = tl.zeros([Q], tl.float32)
    for head in tl.range(first, last, num_stages=STAGES):
        x_tile = tile(x + x_head.to(tl.int64) * ALIGN * head, s, x_row, rows, p, head_dim, WHOLE)
        grad = tile(y_grad + y_grad_head.to(tl.int64) * ALIGN * head, t, y_grad_row, rows, p, head_dim, WHOLE)
        if WHOLE:
            end_grad = tl.load(end_grads + head * size + state_place)
        else:
            end_grad = tl.load(end_grads + head * size + state_place, mask=is_state, other=0.0)
        here = decays + head * padded
        delta = tl.load(here + DELTA * plane + s)
        total_s, total_t = tl.load(here + TOTAL * plane + s), tl.load(here + TOTAL * plane + t)
        end = tl.load(here + TOTAL * plane + Q - 1)
        power, to_end = total_t[None, :] - total_s[:, None], end - total_s
        if EXACT:
            total_s, total_t = tl.load(here + TOTAL_LOW * plane + s), tl.load(here + TOTAL_LOW * plane + t)
            end = tl.load(here + TOTAL_LOW * plane + Q - 1)
            power += total_t[None, :] - total_s[:, None]
            to_end += end - total_s
        to_end = tl.exp2(to_end)

        # Inside of the chunk. What a position reads of itself does not decay and is left out of `decay`.
        decay = tl.exp2(tl.where(is_later, power, float("-inf")))
        grads = product(x_tile, tl.trans(grad), None, EXACT)
        own = tl.sum(tl.where(is_own, grads, 0.0), axis=1)
        own_product_grad += own * delta
        grads *= decay
        products_grad += grads * delta[:, None]
        pairs = grads * products
        delta_grad = tl.sum(pairs, axis=1)
        read = tl.sum(pairs * delta[:, None], axis=0)
        mixing = (products * decay).to(x_tile.dtype)
        written_grad = product(mixing, grad, None, EXACT)

        # By way of the state after the chunk.
        by_state = product(B_tile, end_grad, None, EXACT) * to_end[:, None]
        x_wide = x_tile.to(tl.float32)
        by_state_sum = tl.sum(by_state * x_wide, axis=1)
        weighted = (x_wide * (delta * to_end)[:, None]).to(x_tile.dtype)
        B_sum = product(weighted, tl.trans(end_grad), B_sum, EXACT)

        # (Apart: a sum with a product would become part of it, and its layout that of the other product.)
        found = written_grad * delta[:, None] + by_state * delta[:, None]
        own_factor = own_product * delta
        grad_wide = grad.to(tl.float32)
        if D is not None:
            if D_parts is not None:
                found += (
                    tl.load(D + head * head_dim + p, mask=p < head_dim, other=0.0).to(tl.float32)[None, :] * grad_wide
                )
                target = D_parts + ((batch * chunks + chunk) * heads + head) * head_dim + p
                tl.store(target, tl.sum(x_wide * grad_wide, axis=0), mask=p < head_dim)
            else:
                own_factor += tl.load(D + head).to(tl.float32)
        found += own_factor[:, None] * grad_wide
        target = x_grad + head * head_dim + (s[:, None] * x_grad_row + p[None, :])
        tl.store(target, found.to(x_grad.dtype.element_ty), mask=is_x)

        there = sums + head * padded
        tl.store(there + READ * plane + t, read)
        tl.store(there + WRITTEN * plane + s, delta * delta_grad)
        tl.store(there + DELTA_GRAD * plane + s, delta_grad + by_state_sum + own * own_product)
        tl.store(there + TO_STATE * plane + s, delta * by_state_sum)
        tl.store(there + OWN * plane + s, own)

    products_grad += tl.where(is_own, own_product_grad[:, None], 0.0)
    rounded = products_grad.to(B_tile.dtype)
    B_sum = product(rounded, C_tile, B_sum, EXACT)
    BC_grad_row *= ALIGN
    place = part.to(tl.int64) * BC_grad_part * ALIGN + batch * BC_grad_batch * ALIGN + begin * BC_grad_row
    place += group * states + (s[:, None] * BC_grad_row + n[None, :])
    mask = (s < rows)[:, None] & (n < states)[None, :]
    tl.store(B_grad + place, B_sum.to(B_grad.dtype.element_ty), mask=mask)

    # What they read of the state before the chunk, and what of it was left after the chunk.
    C_sum = product(tl.trans(rounded), B_tile, None, EXACT)
    for head in tl.range(first, last, num_stages=STAGES):
        grad = tile(y_grad + y_grad_head.to(tl.int64) * ALIGN * head, t, y_grad_row, rows, p, head_dim, WHOLE)
        if WHOLE:
            start = tl.load(starts + head * size + state_place)
            end_grad = tl.load(end_grads + head * size + state_place)
        else:
            start = tl.load(starts + head * size + state_place, mask=is_state, other=0.0)
            end_grad = tl.load(end_grads + head * size + state_place, mask=is_state, other=0.0)
        here = decays + head * padded
        from_start, end = tl.load(here + TOTAL * plane + t), tl.load(here + TOTAL * plane + Q - 1)
        if EXACT:
            from_start += tl.load(here + TOTAL_LOW * plane + t)
            end += tl.load(here + TOTAL_LOW * plane + Q - 1)
        weighted_grad = grad.to(tl.float32) * tl.exp2(from_start)[:, None]
        from_state = tl.sum(product(C_tile, start, None, EXACT) * weighted_grad, axis=1)
        C_sum = product(weighted_grad.to(grad.dtype), tl.trans(start), C_sum, EXACT)
        passed = tl.sum(tl.sum(start.to(tl.float32) * end_grad.to(tl.float32), axis=1), axis=0)
        tl.store(sums + head * padded + FROM_STATE * plane + t, from_state)
        tl.store(through + head * chunks, passed * tl.exp2(end))
    tl.store(C_grad + place, C_sum.to(C_grad.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("dt_grad_batch", "dt_grad_row", "dt_batch", "dt_row", "dt_head"),
        *("length", "heads", "chunks"),
    ]
)
def delta_kernel(
    dt,
    A,
    dt_bias,
    decays,
    sums,
    through,
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
    chunks,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of dt of one chunk, and the chunk's parts of those of A, dt_bias and a D of one number per head.

    The gradient of a decay's logarithm is what all products that the decay is part of add to the loss: those that
    begin before it and are read at it or later. parts: (batch x chunks, 3, head) fp32.
    Programs: (batch x chunks, heads / HEADS).
    """
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    t = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (head < heads)[None, :]
    mask = (t < length)[:, None] & is_head
    padded = chunks.to(tl.int64) * Q
    plane = tl.num_programs(0) // chunks * heads * padded
    place = (batch * heads + head)[None, :] * padded + t[:, None]
    delta = tl.load(decays + DELTA * plane + place, mask=is_head, other=0.0)
    read = tl.load(sums + READ * plane + place, mask=is_head, other=0.0).to(tl.float64)
    read -= tl.load(sums + WRITTEN * plane + place, mask=is_head, other=0.0).to(tl.float64)
    read += tl.load(sums + FROM_STATE * plane + place, mask=is_head, other=0.0).to(tl.float64)
    delta_grad = tl.load(sums + DELTA_GRAD * plane + place, mask=is_head, other=0.0)
    to_state = tl.load(sums + TO_STATE * plane + place, mask=is_head, other=0.0).to(tl.float64)
    passed = tl.load(through + (batch * heads + head) * chunks + chunk, mask=head < heads, other=0.0)

    from_here = tl.sum(read, axis=0)[None, :] - tl.cumsum(read, axis=0) + read
    until_here = tl.cumsum(to_state, axis=0) - to_state
    power_grad = (from_here + until_here + passed.to(tl.float64)[None, :]).to(tl.float32)
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)
    raw = raw_delta(dt + batch * dt_batch, dt_bias, t, head, mask, dt_row, dt_head)
    grad = delta_grad + power_grad * rate[None, :]
    free = raw
    if SOFTPLUS:
        free = softplus(raw)
        grad *= sigmoid(raw)
    grad = tl.where(mask & (free >= dt_min) & (free <= dt_max), grad, 0.0)
    target = dt_grad + batch * dt_grad_batch + t[:, None].to(tl.int64) * dt_grad_row + head[None, :]
    tl.store(target, grad.to(dt_grad.dtype.element_ty), mask=mask)

    own = tl.load(sums + OWN * plane + place, mask=is_head, other=0.0)
    parts += tl.program_id(0).to(tl.int64) * 3 * heads + head
    tl.store(parts, tl.sum(power_grad * delta, axis=0), mask=head < heads)
    tl.store(parts + heads, tl.sum(grad, axis=0), mask=head < heads)
    tl.store(parts + 2 * heads, tl.sum(own, axis=0), mask=head < heads)


@triton.jit(
    do_not_specialize=[
        *("y_grad_batch", "y_grad_row", "y_grad_head", "z_batch", "z_row", "z_head", "length", "heads", "head_dim"),
    ]
)
def gate_backward_kernel(
    y_grad,
    ungated,
    z,
    ungated_grad,
    z_grad,
    y_grad_batch,
    y_grad_row,
    y_grad_head,
    z_batch,
    z_row,
    z_head,
    length,
    heads,
    head_dim,
    BLOCK: tl.constexpr,
):
    """The gradients of y before the gate and of z. Programs: (batch x length, heads x head_dim / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    batch, t = row // length, row % length
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < heads * head_dim
    head, p = (channel // head_dim).to(tl.int64), channel % head_dim
    grad = tl.load(y_grad + batch * y_grad_batch + t * y_grad_row + head * y_grad_head + p, mask=mask, other=0.0)
    value = tl.load(z + batch * z_batch + t * z_row + head * z_head + p, mask=mask, other=0.0).to(tl.float32)
    target = row * heads * head_dim + channel
    before = tl.load(ungated + target, mask=mask, other=0.0).to(tl.float32)
    gate, grad = sigmoid(value), grad.to(tl.float32)
    slope = gate * (1.0 + value * (1.0 - gate))
    tl.store(ungated_grad + target, (grad * value * gate).to(ungated_grad.dtype.element_ty), mask=mask)
    tl.store(z_grad + target, (grad * before * slope).to(z_grad.dtype.element_ty), mask=mask)
