"""The backward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, processors
from kernels.launcher import launch
from kernels.ssd.launch import (
    DECAY_HEADS,
    DECAY_WARPS,
    Shape,
    block,
    make_decays,
    of_states,
    shapes,
    state_blocks,
    unit,
    walk,
)

GATE_BLOCK, GATE_WARPS = 1024, 4
SUM_WARPS = 4
PARTS_PER_PROCESSOR = 1  # programs of `gradients_kernel`, wanted at least
MUCH_MEMORY = 2**28  # bytes


class Outputs(NamedTuple):
    """Where gradients go: of any strides along batch and length; B and C of equal ones, x, B and C of one dtype."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


def backward(
    y_grad: Tensor | None,
    final_state_grad: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    seq_idx: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    outputs: Outputs | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one."""
    (batch, length, heads, head_dim), states = x.shape, B.shape[3]
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else unit(y_grad, dtype)
    assert y_grad is not None
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))  # type: ignore[assignment]
    shape = shapes(x).gradients
    chunks = -(-length // shape.chunk)
    with torch.cuda.device_of(x):
        z_grad = x.new_empty((0,))
        if z is not None:
            y_grad, z_grad = _gate_backward(y_grad, ungated, z)
        if outputs is None:
            outputs = Outputs(*(torch.empty(t.shape, dtype=t.dtype, device=device) for t in (x, dt, B, C)))
        state_grads = [starts[0] if starts.numel() else None, final_state_grad]
        initial_grad = torch.empty((batch, heads, head_dim, states), dtype=torch.float32, device=device)
        parts = torch.empty((batch, chunks, 3, heads), dtype=torch.float32, device=device)
        D_parts = None
        if D is not None and D.dim() == 2:
            D_parts = torch.empty((batch, chunks, heads * head_dim), dtype=torch.float32, device=device)
        along = (y_grad, x, dt, B, C, seq_idx, *state_grads, initial_grad, parts, D_parts)
        size = _slice(x, B, chunks)
        for first in range(0, batch, size):
            here = slice(first, first + size)
            sliced: list[Any] = [None if t is None else t[here] for t in along] if size < batch else list(along)
            into = outputs if size == batch else Outputs(*(t[here] for t in outputs))
            _backward_slice(A, D, dt_bias, dt_softplus, dt_min, dt_max, into, shape, *sliced)
        A_grad, bias_grad, D_grad = _head_sums(parts.flatten(0, 1))
        if D_parts is not None:
            D_grad = _sum(D_parts.flatten(0, 1)).view(heads, head_dim)
    found = (outputs.x, outputs.dt, A_grad, outputs.B, outputs.C, D_grad, z_grad, bias_grad)
    grads = [x.new_empty((0,)) if g is None else v.to(g.dtype) for g, v in zip(given, found, strict=True)]
    return *grads, initial_grad  # type: ignore[return-value]


def _slice(x: Tensor, B: Tensor, chunks: int) -> int:
    """Sequences whose backward is computed at once.

    The states before all chunks and their gradients can take several times the memory of x. Where that is much, they
    exist for part of the batch only, large enough for (nearly) each processor to have a program.
    """
    (batch, _, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    if 2 * x.element_size() * batch * chunks * heads * head_dim * states <= MUCH_MEMORY:
        return batch
    return max(1, min(batch, -(-processors(x.device.index) * 31 // 32 // (chunks * groups))))


def _backward_slice(
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    outputs: Outputs,
    shape: Shape,
    y_grad: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    final_state_grad: Tensor | None,
    initial_grad: Tensor,
    parts: Tensor,
    D_parts: Tensor | None,
) -> None:
    """Fill outputs, initial_grad, and what parts (batch, chunk, kind, head) and D_parts are summed from."""
    from kernels.ssd.decay_kernels import delta_kernel

    (batch, length, heads), chunks = dt.shape, parts.shape[1]
    decays = make_decays(dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, shape.chunk, x.dtype)
    totals: tuple[Tensor, Tensor] | None = None
    others: Tensor | None = None
    blocks = state_blocks(B.shape[3], shape.states)
    for states in blocks:
        before, x_grad, first_grad = others, outputs.x, initial_grad
        if states is not blocks[-1]:
            x_grad = others = torch.empty(x.shape, dtype=torch.float32, device=x.device) if others is None else others
        if len(blocks) > 1:
            first_grad = torch.empty_like(initial_grad[..., states], memory_format=torch.contiguous_format)
        _, B_part, C_part, first = of_states(x, B, C, initial, states)
        last_grad = None if final_state_grad is None else final_state_grad[..., states]
        skip = (D, D_parts) if states is blocks[-1] else (None, None)
        into = Outputs(x_grad, outputs.dt, outputs.B[..., states], outputs.C[..., states])
        found = _run(y_grad, x, B_part, C_part, *skip, decays, first, last_grad, first_grad, before, into, shape)
        if first_grad is not initial_grad:
            initial_grad[..., states] = first_grad
        totals = found if totals is None else _add(totals, found)
    assert totals is not None
    launch(
        delta_kernel,
        (batch * chunks, -(-heads // DECAY_HEADS)),
        (dt, A, dt_bias, decays, *totals, outputs.dt, parts),
        (*outputs.dt.stride()[:2], *dt.stride(), dt_min, dt_max, length, heads, chunks),
        (dt_softplus, shape.chunk, DECAY_HEADS),
        DECAY_WARPS,
    )


def _run(
    y_grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_parts: Tensor | None,
    decays: Tensor,
    initial: Tensor | None,
    final_state_grad: Tensor | None,
    initial_grad: Tensor,
    before: Tensor | None,
    outputs: Outputs,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """Fill outputs but for dt, initial_grad and D_parts by one block of states; return `sums` and `through`."""
    from kernels.ssd.backward_kernels import gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunk, chunks = shape.chunk, decays.shape[3] // shape.chunk
    p, n = block(head_dim), block(states)
    wanted = PARTS_PER_PROCESSOR * processors(x.device.index) // (batch * chunks * groups)
    parts = min(heads // groups, max(1, wanted))
    part_heads = -(-heads // groups // parts)
    parts = -(-heads // groups // part_heads)

    def buffer(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=x.device)

    carried = (batch, chunks, heads, states, head_dim)
    starts, end_grads = (torch.empty(carried, dtype=x.dtype, device=x.device) for _ in range(2))
    first, last_grad = (None if t is None else t.float().contiguous() for t in (initial, final_state_grad))
    walk(x, B, decays, (y_grad, C), (first, last_grad), (starts, end_grads, initial_grad, None), chunk)
    BC_grads = [outputs.B.unsqueeze(0), outputs.C.unsqueeze(0)]
    if parts > 1:
        BC_grads = [buffer(parts, batch, length, groups, states) for _ in "BC"]
    sums, through = buffer(6, batch, heads, chunks * chunk), buffer(batch, heads, chunks)
    strides = [s for t in (y_grad, x, B, C) for s in t.stride()[:3]]
    strides += [*outputs.x.stride()[:2], *BC_grads[0].stride()[:4]]
    align = alignment(head_dim, states, *strides)
    programs, whole = batch * chunks * groups * parts, head_dim == p and states == n
    inputs = (y_grad, x, B, C, D, decays, starts, end_grads, before)
    sizes = (length, heads, heads // groups, head_dim // align, states // align, chunks, parts, part_heads)
    launch(
        gradients_kernel,
        (programs, 1),
        (*inputs, outputs.x, *BC_grads, sums, through, D_parts, buffer(programs, chunk, chunk)),
        (*[stride // align for stride in strides], *sizes),
        (whole, x.dtype == torch.float32, align, chunk, p, n, shape.stages),
        shape.warps,
    )
    if parts > 1:
        for grad, summed in zip(BC_grads, (outputs.B, outputs.C), strict=True):
            summed.copy_(grad.sum(0))
    return sums, through


def _add(totals: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernels left of two blocks of states; the last of `sums`, dy·x, is of no state."""
    totals[0][:-1] += found[0][:-1]
    totals[1].add_(found[1])
    return totals


def _gate_backward(y_grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y before the gate, and of z."""
    from kernels.ssd.backward_kernels import gate_backward_kernel

    batch, length, heads, head_dim = z.shape
    ungated_grad, z_grad = torch.empty_like(ungated), torch.empty_like(ungated)
    launch(
        gate_backward_kernel,
        (batch * length, -(-heads * head_dim // GATE_BLOCK)),
        (y_grad, ungated, z, ungated_grad, z_grad),
        (*y_grad.stride()[:3], *z.stride()[:3], length, heads, head_dim),
        (GATE_BLOCK,),
        GATE_WARPS,
    )
    return ungated_grad, z_grad


def _head_sums(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, dt_bias and D from parts (row, 3, head), in a fixed order; they share no memory."""
    from kernels.ssd.decay_kernels import head_sums_kernel
    from kernels.sum_parts import COLUMNS, ROWS

    rows, kinds, heads = parts.shape
    A_grad, bias_grad, D_grad = (torch.empty(heads, dtype=torch.float32, device=parts.device) for _ in range(kinds))
    outputs, grid = (A_grad, bias_grad, D_grad), (-(-heads // COLUMNS), kinds)
    launch(head_sums_kernel, grid, (parts, *outputs), (rows, heads), (kinds, ROWS, COLUMNS), SUM_WARPS)
    return A_grad, bias_grad, D_grad


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis of parts (row, column), in a fixed order."""
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

    rows, columns = parts.shape
    total = torch.empty(columns, dtype=torch.float32, device=parts.device)
    grid = (-(-columns // COLUMNS), 1)
    launch(sum_parts, grid, (parts, total, None), (rows, columns), (1, ROWS, COLUMNS), SUM_WARPS)
    return total
