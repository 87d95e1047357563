"""The backward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, processors
from kernels.launcher import SUM_WARPS, Launch, Piece, Pointer, device_of, remembered, sum_launch
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
from kernels.ssd.workspace import Workspace, workspace

GATE_BLOCK, GATE_WARPS = 1024, 4
SUM_BLOCK = 1024  # numbers of a program that sums parts of the gradients of B and C
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
    with_initial_grad: bool,
    outputs: Outputs | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one."""
    heads, head_dim = x.shape[2:]
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else unit(y_grad, dtype)
    assert y_grad is not None
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))  # type: ignore[assignment]
    shape = shapes(x, B)
    exact, chunk, halves = dtype == torch.float32, shape.gradients.chunk, shape.flows.chunk // shape.gradients.chunk
    with device_of(x):
        z_grad, y_grad_lost = None, None
        if z is not None:
            y_grad, y_grad_lost, z_grad = _gate_backward(y_grad, ungated, z)
        if outputs is None:
            outputs = Outputs(*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)])
        layout = kept.layout(x.shape, dtype, B.shape[3], shape)
        decays: Pointer | None
        decays, carried, initial = kept.cut(x, starts, layout)
        padded = layout.decays_shape[3]
        if initial is not None:
            initial = initial.view(x.shape[0], heads, head_dim, B.shape[3])
        if decays is None:
            *outer, padded = kept.decays_shape(x.shape, dtype, chunk, shape)
            decays = torch.empty((*outer, padded), dtype=torch.float32, device=device)
            fill_decays(decays, padded, dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, chunk, exact)
        rows, D_parts = x.shape[0] * padded, None
        if D is not None and D.dim() == 2:
            D_parts = torch.empty((rows // chunk, heads * head_dim), dtype=torch.float32, device=device)
        initial_grad, work = _of_all_states(
            *((y_grad, y_grad_lost), x, B, C, D, D_parts, decays, padded, initial, carried, final_state_grad, outputs),
            *(with_initial_grad, shape),
        )
        launch = _delta_launch(
            *(dt.shape, B.shape[2], dt.stride(), outputs.dt.stride(), dt_softplus, dt_min, dt_max),
            *(exact, chunk, halves),
        )
        sums = work.sums, work.own_products, work.through, work.owns
        launch(dt, A, dt_bias, decays, *sums, outputs.dt, work.parts)
        A_grad, bias_grad, D_grad = _head_sums(work.parts, rows // (chunk * halves), heads)
        if D_parts is not None:
            D_grad = _sum(D_parts).view(heads, head_dim)
    found = (outputs.x, outputs.dt, A_grad, outputs.B, outputs.C, D_grad, z_grad, bias_grad)
    grads = [
        x.new_empty((0,)) if g is None or v is None else v if v.dtype == g.dtype else v.to(g.dtype)
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
    D_parts: Tensor | None,
    decays: Pointer,
    padded: int,
    initial: Tensor | None,
    carried: Pointer | None,
    final_state_grad: Tensor | None,
    outputs: Outputs,
    with_initial_grad: bool,
    shape: Shapes,
) -> tuple[Tensor, Workspace]:
    """Fill outputs but for dt, and D_parts; return the gradient of the initial state, and sums over states."""
    blocks = state_blocks(B.shape[3], shape.gradients.states)
    if len(blocks) == 1:
        of_all = (y_grads, x, B, C, D, D_parts, decays, padded, initial, carried, final_state_grad, None, outputs)
        return _run(*of_all, with_initial_grad, shape)
    others = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    initial_grads: list[Tensor] = []
    total: Workspace | None = None
    for states in blocks:
        is_last = states is blocks[-1]
        before: Tensor | None = None if total is None else others
        _, B_part, C_part, first = of_states(x, B, C, initial, states)
        last_grad = None if final_state_grad is None else final_state_grad[..., states]
        skip = (D, D_parts) if is_last else (None, None)
        into = Outputs(outputs.x if is_last else others, outputs.dt, outputs.B[..., states], outputs.C[..., states])
        of_part = (y_grads, x, B_part, C_part, *skip, decays, padded, first, None, last_grad, before, into)
        first_grad, work = _run(*of_part, with_initial_grad, shape)
        initial_grads.append(first_grad)
        if total is None:
            total = work
        else:
            for sums, part in zip(total[:3], work[:3], strict=True):
                sums.tensor().add_(part.tensor())
    assert total is not None
    return torch.cat(initial_grads, dim=3) if with_initial_grad else initial_grads[0], total


def _run(
    y_grads: tuple[Tensor, Tensor | None],
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_parts: Tensor | None,
    decays: Pointer,
    padded: int,
    initial: Tensor | None,
    carried: Pointer | None,
    final_state_grad: Tensor | None,
    before: Tensor | None,
    outputs: Outputs,
    with_initial_grad: bool,
    shape: Shapes,
) -> tuple[Tensor, Workspace]:
    """The same of one block of states; before: the gradient of x by others, which is added.

    carried: the states before chunks, where they were kept.
    """
    (batch, _, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunk, exact = shape.gradients.chunk, x.dtype == torch.float32
    blocks, halves = padded // shape.flows.chunk, shape.flows.chunk // chunk
    n_processors = processors(x.device.index)
    parts = _parts(batch * (padded // chunk) * groups, heads // groups, n_processors)
    work = workspace(x, B, padded, chunk, halves, parts, carried is None)
    of_state = (batch, heads, head_dim, states) if with_initial_grad else (0,)
    initial_grad = torch.empty(of_state, dtype=torch.float32, device=x.device)
    starts = work.starts if carried is None else carried
    first, last_grad = (None if t is None else t.float().contiguous() for t in (initial, final_state_grad))
    y_grad, y_grad_lost = y_grads
    into = (starts, work.end_grads, initial_grad if with_initial_grad else None, None)
    walk(x, B, decays, padded, (y_grad, C), (first, last_grad), into, chunk, only_back=carried is not None)

    flow_parts = _parts((2 * halves + 3) * batch * blocks * groups, heads // groups, 2 * n_processors)
    strides = (y_grad.stride(), x.stride(), B.stride(), C.stride())
    launch = _flows_launch(x.shape, B.shape, strides, flow_parts, blocks, exact, chunk, shape.flows)
    # First, as outputs may lie where x, B and C do.
    operands = (x, B, C, decays, starts, work.end_grads)
    launch(y_grad, *operands, work.sums, work.own_products, work.through)
    if y_grad_lost is not None:  # of the strides of y_grad
        lost, *unused = [torch.empty_like(part.tensor()) for part in work[:3]]
        launch(y_grad_lost, *operands, lost, *unused)
        of_starts = (3 * halves + 3) * batch * heads * padded  # what comes after is of end_grads
        work.sums.tensor()[:of_starts] += lost[:of_starts]

    BC_grads: tuple[Pointer, Pointer] = outputs.B, outputs.C
    BC_strides: tuple[int, ...] = (0, *outputs.B.stride()[:3])
    if parts > 1:
        BC_grads, BC_strides = (work.B_parts, work.C_parts), _strides(B.shape)
    written = (*strides, outputs.x.stride(), BC_strides)
    launch = _gradients_launch(x.shape, B.shape, written, parts, padded // chunk, exact, shape.gradients)
    launch(
        *(y_grad, x, B, C, D, decays, starts, work.end_grads, before, outputs.x),
        *(*BC_grads, work.owns, D_parts, work.scratch),
    )
    if parts > 1:
        _sum_BC_launch(B.shape, outputs.B.stride(), parts)(*BC_grads, outputs.B, outputs.C)
    return initial_grad, work


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
    """strides: of y_grad, x, B, C, the gradient of x, and (part, batch, row, group) of those of B and C."""
    from kernels.ssd.backward_kernels import gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    p, n = block(head_dim), block(states)
    *inputs, x_grad, BC_grads = strides
    outer = [stride for rows in inputs for stride in rows[:3]] + [*x_grad[:2], *BC_grads]
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


@remembered
def _sum_BC_launch(B_shape: torch.Size, strides: tuple[int, ...], parts: int) -> Launch:
    """strides: of the gradients of B and C."""
    from kernels.ssd.backward_kernels import sum_BC_kernel

    batch, length, groups, states = B_shape
    n = block(states)
    rows = max(1, SUM_BLOCK // n)
    numbers = (*strides[:3], batch * length, length, states, parts)
    return Launch(sum_BC_kernel, (-(-batch * length // rows), 2 * groups), numbers, (rows, n), SUM_WARPS)


@functools.cache
def _strides(B_shape: torch.Size) -> tuple[int, ...]:
    """Of parts (part, batch, length, group, state), but for the last one."""
    return tuple(math.prod(B_shape[axis:]) for axis in range(4))


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


def _head_sums(parts: Piece, rows: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, dt_bias and D from parts (row, 3, head), in a fixed order; they share no memory."""
    A_grad, bias_grad, D_grad = (torch.empty(heads, dtype=torch.float32, device=parts.device) for _ in range(3))
    _head_sums_launch(rows, 3, heads)(parts, A_grad, bias_grad, D_grad)
    return A_grad, bias_grad, D_grad


@remembered
def _head_sums_launch(rows: int, kinds: int, heads: int) -> Launch:
    from kernels.ssd.decay_kernels import head_sums_kernel
    from kernels.sum_parts import COLUMNS, ROWS

    grid = (-(-heads // COLUMNS), kinds)
    return Launch(head_sums_kernel, grid, (rows, heads), (kinds, ROWS, COLUMNS), SUM_WARPS)


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis of parts (row, column), in a fixed order."""
    rows, columns = parts.shape
    total = parts.new_empty((columns,))
    sum_launch(rows, columns, 1)(parts, total, None)
    return total
