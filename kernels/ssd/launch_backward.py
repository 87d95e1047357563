"""The backward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, processors
from kernels.launcher import launch
from kernels.ssd.launch import (
    DECAY_HEADS,
    DECAY_WARPS,
    Shapes,
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
    from kernels.ssd.decay_kernels import delta_kernel

    batch, length, heads, head_dim = x.shape
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else unit(y_grad, dtype)
    assert y_grad is not None
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))  # type: ignore[assignment]
    shape = shapes(x, B)
    chunk, block = shape.gradients.chunk, shape.flows.chunk
    blocks = -(-length // block)
    chunks = blocks * (block // chunk)
    with torch.cuda.device_of(x):
        z_grad, y_grad_lost = x.new_empty((0,)), None
        if z is not None:
            y_grad, y_grad_lost, z_grad = _gate_backward(y_grad, ungated, z)
        if outputs is None:
            outputs = Outputs(*(torch.empty(t.shape, dtype=t.dtype, device=device) for t in (x, dt, B, C)))
        parts = torch.empty((batch * blocks, 3, heads), dtype=torch.float32, device=device)
        D_parts = None
        if D is not None and D.dim() == 2:
            D_parts = torch.empty((batch * chunks, heads * head_dim), dtype=torch.float32, device=device)
        decays = make_decays(dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, chunk, chunks, dtype)
        initial = starts[0] if starts.numel() else None
        owns = torch.empty(decays.shape[1:], dtype=torch.float32, device=device)
        initial_grad, *sums = _of_all_states(
            (y_grad, y_grad_lost), x, B, C, D, (owns, D_parts), decays, initial, final_state_grad, outputs, shape
        )
        launch(
            delta_kernel,
            (batch * blocks, -(-heads // DECAY_HEADS)),
            (dt, A, dt_bias, decays, *sums, owns, outputs.dt, parts),
            (*outputs.dt.stride()[:2], *dt.stride(), dt_min, dt_max, length, heads, heads // B.shape[2], blocks),
            (dt_softplus, chunk, block // chunk, DECAY_HEADS),
            DECAY_WARPS,
        )
        A_grad, bias_grad, D_grad = _head_sums(parts)
        if D_parts is not None:
            D_grad = _sum(D_parts).view(heads, head_dim)
    found = (outputs.x, outputs.dt, A_grad, outputs.B, outputs.C, D_grad, z_grad, bias_grad)
    grads = [x.new_empty((0,)) if g is None else v.to(g.dtype) for g, v in zip(given, found, strict=True)]
    return *grads, initial_grad  # type: ignore[return-value]


def _of_all_states(
    y_grads: tuple[Tensor, Tensor | None],
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    D_sums: tuple[Tensor, Tensor | None],
    decays: Tensor,
    initial: Tensor | None,
    final_state_grad: Tensor | None,
    outputs: Outputs,
    shape: Shapes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill outputs but for dt, and D_sums; return the gradient of the initial state, sums, own_products, through."""
    blocks = state_blocks(B.shape[3], shape.gradients.states)
    if len(blocks) == 1:
        return _run(y_grads, x, B, C, D, D_sums, decays, initial, final_state_grad, None, outputs, shape)
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
        first_grad, *found = _run(y_grads, x, B_part, C_part, *skip, decays, first, last_grad, before, into, shape)
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
    final_state_grad: Tensor | None,
    before: Tensor | None,
    outputs: Outputs,
    shape: Shapes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of one block of states; before: the gradient of x by others, which is added."""
    (batch, _, heads, head_dim), states = x.shape, B.shape[3]
    chunk, chunks = shape.gradients.chunk, decays.shape[3] // shape.gradients.chunk
    initial_grad = torch.empty((batch, heads, head_dim, states), dtype=torch.float32, device=x.device)
    carried = (torch.empty((batch, chunks, heads, states, head_dim), dtype=x.dtype, device=x.device) for _ in range(2))
    y_grad, y_grad_lost = y_grads
    inputs = (y_grad, x, B, C, decays, *carried)
    first, last_grad = (None if t is None else t.float().contiguous() for t in (initial, final_state_grad))
    walk(x, B, decays, (y_grad, C), (first, last_grad), (*inputs[-2:], initial_grad, None), chunk)
    sums = _flows(*inputs, shape)  # first, as outputs may lie where x, B and C do
    if y_grad_lost is not None:
        sums[0][:-1] += _flows(y_grad_lost, *inputs[1:], shape)[0][:-1]  # the last plane is of end_grads
    _gradients(*inputs, D, D_sums, before, outputs, shape)
    return initial_grad, *sums


def _flows(
    y_grad: Tensor, x: Tensor, B: Tensor, C: Tensor, decays: Tensor, starts: Tensor, end_grads: Tensor, shape: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """What `delta_kernel` needs: sums, own_products, through."""
    from kernels.ssd.flow_kernels import flows_kernel

    (batch, length, heads, head_dim), (groups, states), padded = x.shape, B.shape[2:], decays.shape[3]
    chunk, flows = shape.gradients.chunk, shape.flows
    halves, blocks, p, n = flows.chunk // chunk, padded // flows.chunk, block(head_dim), block(states)
    roles = 2 * halves + 3
    parts = _parts(roles * batch * blocks * groups, heads // groups, 2 * processors(x.device.index))

    def buffer(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=x.device)

    sums = buffer(3 * halves + 4, batch, heads, padded), buffer(batch, groups, padded), buffer(batch, heads, blocks)
    strides = [s for t in (y_grad, x, B, C) for s in t.stride()[:3]]
    align = alignment(head_dim, states, *strides)
    sizes = (length, heads, heads // groups, head_dim // align, states // align, blocks, parts)
    launch(
        flows_kernel,
        (batch * blocks * groups * parts * roles, 1),
        (y_grad, x, B, C, decays, starts, end_grads, *sums),
        (*[stride // align for stride in strides], *sizes, -(-heads // groups // parts)),
        (head_dim == p and states == n, x.dtype == torch.float32, align, chunk, halves, p, n, flows.stages),
        flows.warps,
    )
    return sums


def _gradients(
    y_grad: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    decays: Tensor,
    starts: Tensor,
    end_grads: Tensor,
    D: Tensor | None,
    D_sums: tuple[Tensor, Tensor | None],
    before: Tensor | None,
    outputs: Outputs,
    shape: Shapes,
) -> None:
    """Fill outputs but for dt, and D_sums."""
    from kernels.ssd.backward_kernels import gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    table, chunk = shape.gradients, shape.gradients.chunk
    chunks, p, n = decays.shape[3] // chunk, block(head_dim), block(states)
    parts = _parts(batch * chunks * groups, heads // groups, processors(x.device.index))
    BC_grads = [outputs.B.unsqueeze(0), outputs.C.unsqueeze(0)]
    if parts > 1:
        of_parts = (parts, batch, length, groups, states)
        BC_grads = [torch.empty(of_parts, dtype=torch.float32, device=x.device) for _ in "BC"]
    programs = batch * chunks * groups * parts
    scratch = torch.empty((programs, chunk, chunk), dtype=torch.float32, device=x.device)
    strides = [s for t in (y_grad, x, B, C) for s in t.stride()[:3]]
    strides += [*outputs.x.stride()[:2], *BC_grads[0].stride()[:4]]
    align = alignment(head_dim, states, *strides)
    sizes = (length, heads, heads // groups, head_dim // align, states // align, chunks, parts)
    launch(
        gradients_kernel,
        (programs, 1),
        (y_grad, x, B, C, D, decays, starts, end_grads, before, outputs.x, *BC_grads, *D_sums, scratch),
        (*[stride // align for stride in strides], *sizes, -(-heads // groups // parts)),
        (head_dim == p and states == n, x.dtype == torch.float32, align, chunk, p, n, table.stages),
        table.warps,
    )
    if parts > 1:
        for grad, summed in zip(BC_grads, (outputs.B, outputs.C), strict=True):
            summed.copy_(grad.sum(0))


@functools.cache
def _parts(programs: int, heads: int, n_processors: int) -> int:
    """In how many parts the heads of a group are divided, so that the programs' last wave does not leave many idle."""

    def time(parts: int) -> int:
        return -(-programs * parts // n_processors) * (-(-heads // parts) + PART_COST)

    parts = min(range(1, heads + 1), key=time)
    return -(-heads // -(-heads // parts))  # none without heads


def _gate_backward(y_grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient of y before the gate, what that loses in its dtype (None if it is fp32), and that of z."""
    from kernels.ssd.backward_kernels import gate_backward_kernel

    batch, length, heads, head_dim = z.shape
    ungated_grad, z_grad = torch.empty_like(ungated), torch.empty_like(ungated)
    lost = None if z.dtype == torch.float32 else torch.empty_like(ungated)
    launch(
        gate_backward_kernel,
        (batch * length, -(-heads * head_dim // GATE_BLOCK)),
        (y_grad, ungated, z, ungated_grad, lost, z_grad),
        (*y_grad.stride()[:3], *z.stride()[:3], length, heads, head_dim),
        (GATE_BLOCK,),
        GATE_WARPS,
    )
    return ungated_grad, lost, z_grad


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
