"""The backward of SSD in Triton: the gradients of x, B and C, and that of a gate."""

import triton
import triton.language as tl

from kernels.ssd.decay_kernels import decay_planes
from kernels.ssd.forward_kernels import product, tile
from kernels.triton_math import exp2, sigmoid


@triton.jit(
    do_not_specialize=[
        *("y_grad_batch", "y_grad_row", "y_grad_head", "x_batch", "x_row", "x_head"),
        *("B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
        *("x_grad_batch", "x_grad_row", "BC_grad_part", "BC_grad_batch", "BC_grad_row", "BC_grad_group"),
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
    before,
    x_grad,
    B_grad,
    C_grad,
    owns,
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
    BC_grad_group,
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

    starts, end_grads: what `states_kernel` left. x_grad like x, with neighbouring heads; before: that of other states,
    which is added, in fp32, (batch, length, head, head_dim), None for none, may be x_grad itself. Of equal strides,
    B_grad and C_grad (part, batch, length, group, state); owns (batch, head, padded) fp32: y_grad·x; D_parts
    (batch, chunk, head, head_dim) fp32, None unless D is per channel; scratch (program, Q, Q) fp32.
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
    # What a position reads of itself stays in fp32, on its way to x_grad.
    is_own, is_read = t[None, :] == s[:, None], t[None, :] >= s[:, None]
    own_product = tl.sum(tl.where(is_own, products, 0.0), axis=1)
    products = tl.where(is_own, 0.0, products)

    first = group * group_heads + part * part_heads
    last = min(first + part_heads, (group + 1) * group_heads)
    x += batch * x_batch * ALIGN + begin * x_row
    y_grad += batch * y_grad_batch * ALIGN + begin * y_grad_row
    x_grad += batch * x_grad_batch * ALIGN + begin * x_grad_row
    if before is not None:
        before += (batch * length + begin) * heads * head_dim
    padded = chunks.to(tl.int64) * Q
    plane = batches * heads * padded
    decays += batch * heads * padded + begin
    owns += batch * heads * padded + begin
    size = head_dim * states
    starts += (batch * chunks + chunk) * heads * size
    end_grads += (batch * chunks + chunk) * heads * size
    state_place = n[:, None] * head_dim + p[None, :]
    is_state = (n < states)[:, None] & (p < head_dim)[None, :]
    is_x = (s < rows)[:, None] & (p < head_dim)[None, :]

    # What the positions wrote.
    B_sum = tl.zeros([Q, N], tl.float32)
    products_grad = tl.zeros([Q, Q], tl.float32)
    for head in tl.range(first, last, num_stages=STAGES):
        x_tile = tile(x + x_head.to(tl.int64) * ALIGN * head, s, x_row, rows, p, head_dim, WHOLE)
        grad = tile(y_grad + y_grad_head.to(tl.int64) * ALIGN * head, t, y_grad_row, rows, p, head_dim, WHOLE)
        if WHOLE:
            end_grad = tl.load(end_grads + head * size + state_place)
        else:
            end_grad = tl.load(end_grads + head * size + state_place, mask=is_state, other=0.0)
        totals, _, deltas, _, totals_low, _ = decay_planes(decays + head * padded, plane)
        delta = tl.load(deltas + s)
        total_s, total_t = tl.load(totals + s), tl.load(totals + t)
        end = tl.load(totals + Q - 1)
        power, to_end = total_t[None, :] - total_s[:, None], end - total_s
        if EXACT:
            total_s, total_t = tl.load(totals_low + s), tl.load(totals_low + t)
            end = tl.load(totals_low + Q - 1)
            power += total_t[None, :] - total_s[:, None]
            to_end += end - total_s
        to_end = exp2(to_end)

        # Inside of the chunk.
        decay = exp2(tl.where(is_read, power, float("-inf")))
        products_grad += product(x_tile, tl.trans(grad), None, EXACT) * decay * delta[:, None]
        mixing = (products * decay).to(x_tile.dtype)
        written_grad = product(mixing, grad, None, EXACT)

        # By way of the state after the chunk.
        by_state = product(B_tile, end_grad, None, EXACT) * to_end[:, None]
        x_wide = x_tile.to(tl.float32)
        weighted = (x_wide * (delta * to_end)[:, None]).to(x_tile.dtype)
        B_sum = product(weighted, tl.trans(end_grad), B_sum, EXACT)

        # (Apart: a sum with a product would become part of it, and its layout that of the other product.)
        found = written_grad * delta[:, None] + by_state * delta[:, None]
        own_factor = own_product * delta
        grad_wide = grad.to(tl.float32)
        tl.store(owns + head * padded + s, tl.sum(x_wide * grad_wide, axis=1))
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
        if before is not None:
            others = before + head * head_dim + (s[:, None] * (heads * head_dim) + p[None, :])
            found += tl.load(others, mask=is_x, other=0.0)
        target = x_grad + head * head_dim + (s[:, None] * x_grad_row + p[None, :])
        tl.store(target, found.to(x_grad.dtype.element_ty), mask=is_x)

    rounded = products_grad.to(B_tile.dtype)
    B_sum = product(rounded, C_tile, B_sum, EXACT)
    BC_grad_row *= ALIGN
    place = part.to(tl.int64) * BC_grad_part * ALIGN + batch * BC_grad_batch * ALIGN + begin * BC_grad_row
    place += group.to(tl.int64) * BC_grad_group * ALIGN
    mask = (s < rows)[:, None] & (n < states)[None, :]
    tl.store(B_grad + (place + s[:, None] * BC_grad_row + n[None, :]), B_sum.to(B_grad.dtype.element_ty), mask=mask)

    # What they read of the state before the chunk; (n, t), as ptxas of Triton 3.6 has every product of the kernel wait
    # for the one before where this one, of factors in registers, is still being added up when the next head begins.
    C_sum = product(tl.trans(B_tile), rounded, None, EXACT)
    for head in tl.range(first, last, num_stages=STAGES):
        grad = tile(y_grad + y_grad_head.to(tl.int64) * ALIGN * head, t, y_grad_row, rows, p, head_dim, WHOLE)
        if WHOLE:
            start = tl.load(starts + head * size + state_place)
        else:
            start = tl.load(starts + head * size + state_place, mask=is_state, other=0.0)
        totals, _, _, _, totals_low, _ = decay_planes(decays + head * padded, plane)
        from_start = tl.load(totals + t)
        if EXACT:
            from_start += tl.load(totals_low + t)
        weighted_grad = (grad.to(tl.float32) * exp2(from_start)[:, None]).to(grad.dtype)
        C_sum = product(start, tl.trans(weighted_grad), C_sum, EXACT)
    mask = (t < rows)[None, :] & (n < states)[:, None]
    tl.store(C_grad + (place + t[None, :] * BC_grad_row + n[:, None]), C_sum.to(C_grad.dtype.element_ty), mask=mask)


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
    lost,
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
    """The gradients of y before the gate, what that loses in its dtype, None where it is fp32, and that of z.

    Programs: (batch x length, heads x head_dim / BLOCK).
    """
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
    exact = grad * value * gate
    rounded = exact.to(ungated_grad.dtype.element_ty)
    tl.store(ungated_grad + target, rounded, mask=mask)
    if lost is not None:
        tl.store(lost + target, (exact - rounded.to(tl.float32)).to(lost.dtype.element_ty), mask=mask)
    tl.store(z_grad + target, (grad * before * slope).to(z_grad.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["grad_batch", "grad_row", "grad_group", "rows", "length", "states", "parts"],
)
def sum_BC_kernel(
    B_parts,
    C_parts,
    B_grad,
    C_grad,
    grad_batch,
    grad_row,
    grad_group,
    rows,
    length,
    states,
    parts,
    ROWS: tl.constexpr,
    N: tl.constexpr,
):
    """The gradients of B and C, of equal strides: sums of parts (part, batch, length, group, state) fp32, in order.

    rows: batch x length. Programs: (rows / ROWS, 2 x groups).
    """
    groups = tl.num_programs(1) // 2
    is_C, group = tl.program_id(1) // groups, (tl.program_id(1) % groups).to(tl.int64)
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
    mask = (row < rows)[:, None] & (n < states)[None, :]
    source = (row.to(tl.int64) * groups + group)[:, None] * states + n[None, :]
    part_size = rows.to(tl.int64) * groups * states
    total = tl.zeros([ROWS, N], tl.float32)
    target = ((row // length).to(tl.int64) * grad_batch + (row % length).to(tl.int64) * grad_row)[:, None] + n[None, :]
    target += group * grad_group
    if is_C:
        for _ in range(parts):
            total += tl.load(C_parts + source, mask=mask, other=0.0)
            source += part_size
        tl.store(C_grad + target, total.to(C_grad.dtype.element_ty), mask=mask)
    else:
        for _ in range(parts):
            total += tl.load(B_parts + source, mask=mask, other=0.0)
            source += part_size
        tl.store(B_grad + target, total.to(B_grad.dtype.element_ty), mask=mask)
