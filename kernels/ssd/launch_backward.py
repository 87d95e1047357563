"""The backward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, processors
from kernels.launcher import Launch, remembered
from kernels.ssd import kept
from kernels.ssd.launch import (
    DECAY_HEADS,
    DECAY_WARPS,
    Shape,
    block,
    fill_decays,
    of_states,
    shapes,
    state_blocks,
    unit,
    walk,
)

GATE_BLOCK, GATE_WARPS = 1024, 4
SUM_WARPS = 4
PART_COST = 3  # what a program of `gradients_kernel` costs besides its heads, in heads


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
    heads, head_dim = x.shape[2:]
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else unit(y_grad, dtype)
    assert y_grad is not None
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))  # type: ignore[assignment]
    shape = shapes(x, B).gradients
    rows = x.shape[0] * -(-x.shape[1] // shape.chunk)
    with torch.cuda.device_of(x):
        z_grad = x.new_empty((0,))
        if z is not None:
            y_grad, z_grad = _gate_backward(y_grad, ungated, z)
        if outputs is None:
            outputs = Outputs(*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)])
        parts, D_parts = torch.empty((rows, 3, heads), dtype=torch.float32, device=device), None
        if D is not None and D.dim() == 2:
            D_parts = torch.empty((rows, heads * head_dim), dtype=torch.float32, device=device)
        decays, carried, initial = kept.cut(x, B, starts, shapes(x, B))
        if decays is None:
            decays = torch.empty(kept.decays_shape(x, shape.chunk), dtype=torch.float32, device=device)
            fill_decays(decays, dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, shape.chunk)
        initial_grad, *sums = _of_all_states(
            y_grad, x, B, C, D, D_parts, decays, initial, carried, final_state_grad, outputs, shape
        )
        launch = _delta_launch(
            dt.shape, B.shape[2], dt.stride(), outputs.dt.stride(), dt_softplus, dt_min, dt_max, shape.chunk
        )
        launch(dt, A, dt_bias, decays, *sums, outputs.dt, parts)
        A_grad, bias_grad, D_grad = _head_sums(parts)
        if D_parts is not None:
            D_grad = _sum(D_parts).view(heads, head_dim)
    found = (outputs.x, outputs.dt, A_grad, outputs.B, outputs.C, D_grad, z_grad, bias_grad)
    grads = [
        x.new_empty((0,)) if g is None else v if v.dtype == g.dtype else v.to(g.dtype)
        for g, v in zip(given, found, strict=True)
    ]
    return *grads, initial_grad  # type: ignore[return-value]


@remembered
def _delta_launch(
    dt_shape: torch.Size,
    groups: int,
    dt_strides: tuple[int, ...],
    dt_grad_strides: tuple[int, ...],
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk: int,
) -> Launch:
    from kernels.ssd.decay_kernels import delta_kernel

    batch, length, heads = dt_shape
    chunks = -(-length // chunk)
    return Launch(
        delta_kernel,
        (batch * chunks, -(-heads // DECAY_HEADS)),
        (*dt_grad_strides[:2], *dt_strides, dt_min, dt_max, length, heads, heads // groups, chunks),
        (dt_softplus, chunk, DECAY_HEADS),
        DECAY_WARPS,
    )


def _of_all_states(
    y_grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_parts: Tensor | None,
    decays: Tensor,
    initial: Tensor | None,
    carried: Tensor | None,
    final_state_grad: Tensor | None,
    outputs: Outputs,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill outputs but for dt, and D_parts; return the gradient of the initial state, sums, own_products, through."""
    blocks = state_blocks(B.shape[3], shape.states)
    if len(blocks) == 1:
        return _run(y_grad, x, B, C, D, D_parts, decays, initial, carried, final_state_grad, None, outputs, shape)
    others = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    initial_grads: list[Tensor] = []
    totals: list[Tensor] | None = None
    for states in blocks:
        is_last = states is blocks[-1]
        before: Tensor | None = None if totals is None else others
        _, B_part, C_part, first = of_states(x, B, C, initial, states)
        last_grad = None if final_state_grad is None else final_state_grad[..., states]
        skip = (D, D_parts) if is_last else (None, None)
        into = Outputs(outputs.x if is_last else others, outputs.dt, outputs.B[..., states], outputs.C[..., states])
        first_grad, *found = _run(y_grad, x, B_part, C_part, *skip, decays, first, None, last_grad, before, into, shape)
        initial_grads.append(first_grad)
        if totals is None:
            totals = found
        else:
            found[0].view(5, -1)[-1] = 0  # dy·x, which is of no state
            for total, part in zip(totals, found, strict=True):
                total += part
    assert totals is not None
    return torch.cat(initial_grads, dim=3), *totals  # type: ignore[return-value]


def _run(
    y_grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_parts: Tensor | None,
    decays: Tensor,
    initial: Tensor | None,
    carried: Tensor | None,
    final_state_grad: Tensor | None,
    before: Tensor | None,
    outputs: Outputs,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of one block of states; before: the gradient of x by others, which is added.

    carried: the states before chunks, where they were kept.
    """
    (batch, _, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunk, chunks = shape.chunk, decays.shape[3] // shape.chunk
    parts = _parts(batch * chunks * groups, heads // groups, processors(x.device.index))
    initial_grad = torch.empty((batch, heads, head_dim, states), dtype=torch.float32, device=x.device)
    end_grads = torch.empty((batch, chunks, heads, states, head_dim), dtype=x.dtype, device=x.device)
    starts = torch.empty_like(end_grads) if carried is None else carried
    first, last_grad = (None if t is None else t.float().contiguous() for t in (initial, final_state_grad))
    into = (starts, end_grads, initial_grad, None)
    walk(x, B, decays, (y_grad, C), (first, last_grad), into, chunk, only_back=carried is not None)
    BC_grads = [outputs.B.unsqueeze(0), outputs.C.unsqueeze(0)]
    if parts > 1:
        BC_grads = [torch.empty((parts, *B.shape), dtype=torch.float32, device=x.device) for _ in "BC"]
    sizes = _buffer_sizes(batch, heads, groups, chunks, chunk, parts)
    numbers = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    sums, through, own_products, scratch = torch.split_with_sizes(numbers, sizes)
    strides = (y_grad.stride(), x.stride(), B.stride(), C.stride(), outputs.x.stride(), BC_grads[0].stride())
    launch = _gradients_launch(x.shape, B.shape, strides, parts, x.dtype == torch.float32, shape)
    inputs = (y_grad, x, B, C, D, decays, starts, end_grads, before)
    launch(*inputs, outputs.x, *BC_grads, sums, own_products, through, D_parts, scratch)
    if parts > 1:
        for grad, summed in zip(BC_grads, (outputs.B, outputs.C), strict=True):
            summed.copy_(grad.sum(0))
    return initial_grad, sums, own_products, through


@functools.cache
def _buffer_sizes(batch: int, heads: int, groups: int, chunks: int, chunk: int, parts: int) -> list[int]:
    """Numbers in `sums`, `through`, `own_products` and what programs write aside: of one tensor, as asking takes time.

    Multiples of 4, so that each begins at an address that Triton takes for aligned.
    """
    positions = chunks * chunk
    shapes = (5, batch, heads, positions), (batch, heads, chunks), (batch, groups, positions)
    programs = batch * chunks * groups * parts
    return [-(-math.prod(sizes) // 4) * 4 for sizes in (*shapes, (programs, chunk, chunk))]


@remembered
def _gradients_launch(
    x_shape: torch.Size,
    B_shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    parts: int,
    exact: bool,
    shape: Shape,
) -> Launch:
    """strides: of y_grad, x, B, C, the gradient of x, and those of B and C in parts."""
    from kernels.ssd.backward_kernels import gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    chunks, p, n = -(-length // shape.chunk), block(head_dim), block(states)
    *inputs, x_grad, BC_grads = strides
    outer = [stride for rows in inputs for stride in rows[:3]] + [*x_grad[:2], *BC_grads[:4]]
    align = alignment(head_dim, states, *outer)
    part_heads = -(-heads // groups // parts)
    sizes = (length, heads, heads // groups, head_dim // align, states // align, chunks, parts, part_heads)
    return Launch(
        gradients_kernel,
        (batch * chunks * groups * parts, 1),
        (*[stride // align for stride in outer], *sizes),
        (head_dim == p and states == n, exact, align, shape.chunk, p, n, shape.stages),
        shape.warps,
    )


@functools.cache
def _parts(programs: int, heads: int, n_processors: int) -> int:
    """In how many parts the heads of a group are divided, so that the programs' last wave does not leave many idle."""

    def time(parts: int) -> int:
        return -(-programs * parts // n_processors) * (-(-heads // parts) + PART_COST)

    parts = min(range(1, heads + 1), key=time)
    return -(-heads // -(-heads // parts))  # none without heads


def _gate_backward(y_grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y before the gate, and of z."""
    ungated_grad, z_grad = torch.empty_like(ungated), torch.empty_like(ungated)
    _gate_launch(z.shape, y_grad.stride(), z.stride())(y_grad, ungated, z, ungated_grad, z_grad)
    return ungated_grad, z_grad


@remembered
def _gate_launch(z_shape: torch.Size, grad_strides: tuple[int, ...], z_strides: tuple[int, ...]) -> Launch:
    from kernels.ssd.backward_kernels import gate_backward_kernel

    batch, length, heads, head_dim = z_shape
    grid = (batch * length, -(-heads * head_dim // GATE_BLOCK))
    numbers = (*grad_strides[:3], *z_strides[:3], length, heads, head_dim)
    return Launch(gate_backward_kernel, grid, numbers, (GATE_BLOCK,), GATE_WARPS)


def _head_sums(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, dt_bias and D from parts (row, 3, head), in a fixed order; they share no memory."""
    rows, kinds, heads = parts.shape
    A_grad = torch.empty(heads, dtype=torch.float32, device=parts.device)
    bias_grad, D_grad = torch.empty_like(A_grad), torch.empty_like(A_grad)
    _head_sums_launch(rows, kinds, heads)(parts, A_grad, bias_grad, D_grad)
    return A_grad, bias_grad, D_grad


@remembered
def _head_sums_launch(rows: int, kinds: int, heads: int) -> Launch:
    from kernels.ssd.decay_kernels import head_sums_kernel
    from kernels.sum_parts import COLUMNS, ROWS

    grid = (-(-heads // COLUMNS), kinds)
    return Launch(head_sums_kernel, grid, (rows, heads), (kinds, ROWS, COLUMNS), SUM_WARPS)


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis of parts (row, column), in a fixed order."""
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

    rows, columns = parts.shape
    total = parts.new_empty((columns,))
    grid = (-(-columns // COLUMNS), 1)
    Launch(sum_parts, grid, (rows, columns), (1, ROWS, COLUMNS), SUM_WARPS)(parts, total, None)
    return total
