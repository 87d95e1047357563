"""The backward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import processors
from kernels.launcher import SUM_WARPS, Launch, Piece, Pointer, device_of, remembered, sum_launch
from kernels.ssd import kept
from kernels.ssd.backward_plan import backward_plan
from kernels.ssd.launch import (
    DECAY_HEADS,
    DECAY_WARPS,
    Shapes,
    fill_decays,
    of_states,
    shapes,
    state_blocks,
    unit,
)
from kernels.ssd.workspace import Sums, added, workspace

GATE_BLOCK, GATE_WARPS = 1024, 4


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
        initial_grad, sums = _of_all_states(
            *((y_grad, y_grad_lost), x, B, C, D, D_parts, decays, padded, initial, carried, final_state_grad, outputs),
            *(with_initial_grad, shape),
        )
        launch = _delta_launch(
            *(dt.shape, B.shape[2], dt.stride(), outputs.dt.stride(), dt_softplus, dt_min, dt_max),
            *(exact, chunk, halves),
        )
        launch(dt, A, dt_bias, decays, *sums[:4], outputs.dt, sums.parts)
        A_grad, bias_grad, D_grad = _head_sums(sums.parts, rows // (chunk * halves), heads)
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
) -> tuple[Tensor, Sums]:
    """Fill outputs but for dt, and D_parts; return the gradient of the initial state, and sums over states."""
    blocks = state_blocks(B.shape[3], shape.gradients.states)
    if len(blocks) == 1:
        of_all = (y_grads, x, B, C, D, D_parts, decays, padded, initial, carried, final_state_grad, None, outputs)
        return _run(*of_all, with_initial_grad, shape)
    others = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    initial_grads: list[Tensor] = []
    total: Sums | None = None
    for states in blocks:
        is_last = states is blocks[-1]
        before: Tensor | None = None if total is None else others
        _, B_part, C_part, first = of_states(x, B, C, initial, states)
        last_grad = None if final_state_grad is None else final_state_grad[..., states]
        skip = (D, D_parts) if is_last else (None, None)
        into = Outputs(outputs.x if is_last else others, outputs.dt, outputs.B[..., states], outputs.C[..., states])
        of_part = (y_grads, x, B_part, C_part, *skip, decays, padded, first, None, last_grad, before, into)
        first_grad, sums = _run(*of_part, with_initial_grad, shape)
        initial_grads.append(first_grad)
        total = added(total, sums)
        del sums  # and its workspace, before the next one
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
) -> tuple[Tensor, Sums]:
    """The same of one block of states; before: the gradient of x by others, which is added.

    carried: the states before chunks, where they were kept.
    """
    (batch, _, heads, head_dim), states = x.shape, B.shape[3]
    y_grad, y_grad_lost = y_grads
    strides = y_grad.stride(), x.stride(), B.stride(), C.stride(), outputs.x.stride(), outputs.B.stride()
    n_processors, with_starts = processors(x.device.index), carried is None
    plan = backward_plan(x.shape, B.shape, x.dtype, strides, padded, with_starts, n_processors, shape)
    work = workspace(plan.sizes, x)
    of_state = (batch, heads, head_dim, states) if with_initial_grad else (0,)
    initial_grad = torch.empty(of_state, dtype=torch.float32, device=x.device)
    starts = work.starts if carried is None else carried
    first, last_grad = [None if t is None else t.float().contiguous() for t in (initial, final_state_grad)]
    into = starts, work.end_grads, initial_grad if with_initial_grad else None
    plan.walk(x, B, y_grad, C, decays, first, last_grad, *into, None)
    # First, as outputs may lie where x, B and C do.
    operands = x, B, C, decays, starts, work.end_grads
    plan.flows(y_grad, *operands, *work.sums[:3])
    if y_grad_lost is not None:  # of the strides of y_grad
        lost, *unused = [torch.empty_like(part.tensor()) for part in work.sums[:3]]
        plan.flows(y_grad_lost, *operands, lost, *unused)
        work.sums.of_flows.tensor()[: plan.of_starts] += lost[: plan.of_starts]
    BC_grads = (outputs.B, outputs.C) if plan.sum_BC is None else (work.B_parts, work.C_parts)
    plan.gradients(
        *(y_grad, x, B, C, D, decays, starts, work.end_grads, before),
        *(outputs.x, *BC_grads, work.sums.owns, D_parts, work.scratch),
    )
    if plan.sum_BC is not None:
        plan.sum_BC(*BC_grads, outputs.B, outputs.C)
    return initial_grad, work.sums


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
