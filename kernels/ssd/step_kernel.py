"""One position of SSD for every sequence and head, in one kernel: the state is read and written once."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_math import clamp, narrowed, softplus


@triton.jit
def step_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    y,
    new_state,
    dt_min,
    dt_max,
    heads,
    head_dim,
    states,
    heads_of_group,
    state_batch,
    state_head,
    state_row,
    state_column,
    x_batch,
    x_head,
    x_row,
    dt_batch,
    dt_head,
    B_batch,
    B_group,
    B_state,
    C_batch,
    C_group,
    C_state,
    D_head,
    D_row,
    z_batch,
    z_head,
    z_row,
    SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b * heads + h, r): ROWS of the head_dim rows of a head's state. y and new_state are contiguous.

    new_state may be state itself.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.program_id(0).to(tl.int64) // heads
    head = tl.program_id(0).to(tl.int64) % heads
    group = head // heads_of_group
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, STATES)
    of_head, column = row < head_dim, n < states
    both = of_head[:, None] & column[None, :]

    # All loads before the arithmetic: most of the time goes by while they are on their way.
    place = state + sequence * state_batch + head * state_head + row[:, None] * state_row + n[None, :] * state_column
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    delta = tl.load(dt + sequence * dt_batch + head * dt_head).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    value = tl.load(x + sequence * x_batch + head * x_head + row * x_row, mask=of_head, other=0.0).to(tl.float32)
    read = tl.load(B + sequence * B_batch + group * B_group + n * B_state, mask=column, other=0.0).to(tl.float32)
    written = tl.load(C + sequence * C_batch + group * C_group + n * C_state, mask=column, other=0.0).to(tl.float32)
    if dt_bias is not None:
        delta += tl.load(dt_bias + head).to(tl.float32)
    if D is not None:
        skip = tl.load(D + head * D_head + row * D_row, mask=of_head, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + sequence * z_batch + head * z_head + row * z_row, mask=of_head, other=0.0).to(tl.float32)

    if A_IS_LOG:
        rate = -tl.exp(rate)
    if SOFTPLUS:
        delta = softplus(delta)
    delta = clamp(delta, dt_min, dt_max)
    h = tl.exp(delta * rate) * h + (delta * value)[:, None] * read[None, :]
    first = tl.program_id(0).to(tl.int64) * head_dim
    # A small block is loaded by several warps, of which one may still be on its way when another one stores.
    tl.debug_barrier()
    tl.store(
        new_state + (first + row[:, None]) * states + n[None, :], narrowed(h, new_state.dtype.element_ty), mask=both
    )
    out = tl.sum(h * written[None, :], axis=1)
    if D is not None:
        out += skip
    if z is not None:
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + first + row, out.to(y.dtype.element_ty), mask=of_head)
