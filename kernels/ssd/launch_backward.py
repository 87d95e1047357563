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
    Shapes,
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
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one.

    With `outputs` there is no initial state, and that gradient is empty.
    """
    heads, head_dim = x.shape[2:]
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else unit(y_grad, dtype)
    assert y_grad is not None
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))  # type: ignore[assignment]
    shape = shapes(x, B)
    chunk, halves = shape.gradients.chunk, shape.flows.chunk // shape.gradients.chunk
    with torch.cuda.device_of(x):
        z_grad, y_grad_lost = x.new_empty((0,)), None
        if z is not None:
            y_grad, y_grad_lost, z_grad = _gate_backward(y_grad, ungated, z)
        wants_initial_grad = outputs is None
        if outputs is None:
            outputs = Outputs(*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)])
        decays, carried, initial = kept.cut(x, B, starts, shape)
        if decays is None:
            decays = torch.empty(kept.decays_shape(x, chunk, shape), dtype=torch.float32, device=device)
            fill_decays(decays, dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, chunk)
        rows, D_parts = x.shape[0] * decays.shape[3], None
        parts = torch.empty((rows // (chunk * halves), 3, heads), dtype=torch.float32, device=device)
        if D is not None and D.dim() == 2:
            D_parts = torch.empty((rows // chunk, heads * head_dim), dtype=torch.float32, device=device)
        owns = torch.empty(decays.shape[1:], dtype=torch.float32, device=device)
        D_sums = owns, D_parts
        initial_grad, *sums = _of_all_states(
            *((y_grad, y_grad_lost), x, B, C, D, D_sums, decays, initial, carried, final_state_grad, outputs),
            *(wants_initial_grad, shape),
        )
        launch = _delta_launch(
            *(dt.shape, B.shape[2], dt.stride(), outputs.dt.stride(), dt_softplus, dt_min, dt_max),
            *(dtype == torch.float32, chunk, halves),
        )
        launch(dt, A, dt_bias, decays, *sums, owns, outputs.dt, parts)
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
    exact: bool,
    chunk: int,
    halves: int,
) -> Launch:
    from kernels.ssd.decay_kernels import delta_kernel

    batch, length, heads = dt_shape
    blocks = -(-length // (chunk * halves))
    return Launch(
        delta_kernel,
        (batch * blocks, -(-heads // DECAY_HEADS)),
        (*dt_grad_strides[:2], *dt_strides, dt_min, dt_max, length, heads, heads // groups, blocks),
        (dt_softplus, exact, chunk, halves, DECAY_HEADS),
        DECAY_WARPS,
    )


def _of_all_states(
    y_grads: tuple[Tensor, Tensor | None],
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_sums: tuple[Tensor, Tensor | None],
    decays: Tensor,
    initial: Tensor | None,
    carried: Tensor | None,
    final_state_grad: Tensor | None,
    outputs: Outputs,
    wants_initial_grad: bool,
    shape: Shapes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill outputs but for dt, and D_sums; return the gradient of the initial state, sums, own_products, through."""
    blocks = state_blocks(B.shape[3], shape.gradients.states)
    if len(blocks) == 1:
        of_all = (y_grads, x, B, C, D, D_sums, decays, initial, carried, final_state_grad, None, outputs)
        return _run(*of_all, wants_initial_grad, shape)
    others = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    initial_grads: list[Tensor] = []
    totals: list[Tensor] | None = None
    for states in blocks:
        is_last = states is blocks[-1]
        before: Tensor | None = None if totals is None else others
        _, B_part, C_part, first = of_states(x, B, C, initial, states)
        last_grad = None if final_state_grad is None else final_state_grad[..., states]
        skip = (D, D_sums) if is_last else (None, (D_sums[0], None))
        into = Outputs(outputs.x if is_last else others, outputs.dt, outputs.B[..., states], outputs.C[..., states])
        of_part = (y_grads, x, B_part, C_part, *skip, decays, first, None, last_grad, before, into)
        first_grad, *found = _run(*of_part, wants_initial_grad, shape)
        initial_grads.append(first_grad)
        if totals is None:
            totals = found
        else:
            for total, part in zip(totals, found, strict=True):
                total += part
    assert totals is not None
    return torch.cat(initial_grads, dim=3), *totals  # type: ignore[return-value]


def _run(
    y_grads: tuple[Tensor, Tensor | None],
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_sums: tuple[Tensor, Tensor | None],
    decays: Tensor,
    initial: Tensor | None,
    carried: Tensor | None,
    final_state_grad: Tensor | None,
    before: Tensor | None,
    outputs: Outputs,
    wants_initial_grad: bool,
    shape: Shapes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of one block of states; before: the gradient of x by others, which is added.

    carried: the states before chunks, where they were kept.
    """
    (batch, _, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunk, chunks = shape.gradients.chunk, decays.shape[3] // shape.gradients.chunk
    blocks, halves = decays.shape[3] // shape.flows.chunk, shape.flows.chunk // chunk
    wanted_states = states if wants_initial_grad else 0
    initial_grad = torch.empty((batch, heads, head_dim, wanted_states), dtype=torch.float32, device=x.device)
    end_grads = torch.empty((batch, chunks, heads, states, head_dim), dtype=x.dtype, device=x.device)
    starts = torch.empty_like(end_grads) if carried is None else carried
    first, last_grad = (None if t is None else t.float().contiguous() for t in (initial, final_state_grad))
    y_grad, y_grad_lost = y_grads
    into = (starts, end_grads, initial_grad if wants_initial_grad else None, None)
    walk(x, B, decays, (y_grad, C), (first, last_grad), into, chunk, only_back=carried is not None)

    exact, n_processors = x.dtype == torch.float32, processors(x.device.index)
    parts = _parts((2 * halves + 3) * batch * blocks * groups, heads // groups, 2 * n_processors)
    sizes = _buffer_sizes(batch, heads, groups, decays.shape[3], blocks, halves)
    numbers = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    sums, own_products, through = torch.split_with_sizes(numbers, sizes)
    strides = (y_grad.stride(), x.stride(), B.stride(), C.stride())
    launch = _flows_launch(x.shape, B.shape, strides, parts, blocks, exact, chunk, shape.flows)
    # First, as outputs may lie where x, B and C do.
    launch(y_grad, x, B, C, decays, starts, end_grads, sums, own_products, through)
    if y_grad_lost is not None:  # of the strides of y_grad
        lost, *unused = torch.split_with_sizes(torch.empty_like(numbers), sizes)
        launch(y_grad_lost, x, B, C, decays, starts, end_grads, lost, *unused)
        of_starts = (3 * halves + 3) * batch * heads * decays.shape[3]  # what comes after is of end_grads
        sums[:of_starts] += lost[:of_starts]

    parts = _parts(batch * chunks * groups, heads // groups, n_processors)
    BC_grads = [outputs.B.unsqueeze(0), outputs.C.unsqueeze(0)]
    if parts > 1:
        BC_grads = [torch.empty((parts, *B.shape), dtype=torch.float32, device=x.device) for _ in "BC"]
    scratch = torch.empty(batch * chunks * groups * parts * chunk * chunk, dtype=torch.float32, device=x.device)
    written = (*strides, outputs.x.stride(), BC_grads[0].stride())
    launch = _gradients_launch(x.shape, B.shape, written, parts, chunks, exact, shape.gradients)
    inputs = (y_grad, x, B, C, D, decays, starts, end_grads, before)
    launch(*inputs, outputs.x, *BC_grads, *D_sums, scratch)
    if parts > 1:
        for grad, summed in zip(BC_grads, (outputs.B, outputs.C), strict=True):
            summed.copy_(grad.sum(0))
    return initial_grad, sums, own_products, through


@functools.cache
def _buffer_sizes(batch: int, heads: int, groups: int, padded: int, blocks: int, halves: int) -> list[int]:
    """Numbers in `sums`, `own_products` and `through`: of one tensor, as asking takes time.

    Multiples of 4, so that each begins at an address that Triton takes for aligned.
    """
    shapes = (3 * halves + 4, batch, heads, padded), (batch, groups, padded), (batch, heads, blocks)
    return [-(-math.prod(sizes) // 4) * 4 for sizes in shapes]


@remembered
def _flows_launch(
    x_shape: torch.Size,
    B_shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    parts: int,
    blocks: int,
    exact: bool,
    chunk: int,
    shape: Shape,
) -> Launch:
    """strides: of y_grad, x, B, C."""
    from kernels.ssd.flow_kernels import flows_kernel

    (batch, length, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    halves, p, n = shape.chunk // chunk, block(head_dim), block(states)
    outer = [stride for rows in strides for stride in rows[:3]]
    align = alignment(head_dim, states, *outer)
    sizes = (length, heads, heads // groups, head_dim // align, states // align, blocks, parts)
    return Launch(
        flows_kernel,
        (batch * blocks * groups * parts * (2 * halves + 3), 1),
        (*[stride // align for stride in outer], *sizes, -(-heads // groups // parts)),
        (head_dim == p and states == n, exact, align, chunk, halves, p, n, shape.stages),
        shape.warps,
    )


@remembered
def _gradients_launch(
    x_shape: torch.Size,
    B_shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    parts: int,
    chunks: int,
    exact: bool,
    shape: Shape,
) -> Launch:
    """strides: of y_grad, x, B, C, the gradient of x, and those of B and C in parts."""
    from kernels.ssd.backward_kernels import gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    p, n = block(head_dim), block(states)
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


def _gate_backward(y_grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient of y before the gate, what that loses in its dtype (None if it is fp32), and that of z."""
    ungated_grad, z_grad = torch.empty_like(ungated), torch.empty_like(ungated)
    lost = None if z.dtype == torch.float32 else torch.empty_like(ungated)
    _gate_launch(z.shape, y_grad.stride(), z.stride())(y_grad, ungated, z, ungated_grad, lost, z_grad)
    return ungated_grad, lost, z_grad


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
