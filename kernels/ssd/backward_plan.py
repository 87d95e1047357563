"""What SSD's backward launches, and what it allocates: all that follows from shapes, strides and dtypes.

It is found once for each combination of these: to find it takes the host longer than to launch the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kernels.dispatch import alignment
from kernels.launcher import SUM_WARPS, Launch, remembered
from kernels.ssd.launch import PROGRAMS_PER_PROCESSOR, Shape, Shapes, block, walk_launch
from kernels.ssd.workspace import Sizes, workspace_sizes

SUM_BLOCK = 1024  # numbers of a program that sums parts of the gradients of B and C
PART_COST = 3  # what a program of `gradients_kernel` costs besides its heads, in heads


class Plan(NamedTuple):
    """Of one block of states."""

    sizes: Sizes
    of_starts: int  # numbers at the beginning of `sums` that do not depend on the gradients of states
    walk: Launch
    flows: Launch
    gradients: Launch
    sum_BC: Launch | None  # where the heads of a group are divided


@remembered
def backward_plan(
    x_shape: torch.Size,
    B_shape: torch.Size,
    dtype: torch.dtype,
    strides: tuple[tuple[int, ...], ...],
    padded: int,
    with_starts: bool,
    n_processors: int,
    shape: Shapes,
) -> Plan:
    """strides: of y_grad, x, B, C, the gradients of x and B; padded: the length in whole blocks of `flows_kernel`;
    with_starts: the states before chunks are not there yet.
    """
    (batch, _, heads, _), groups = x_shape, B_shape[2]
    *given, x_grad, B_grad = strides
    chunk, exact = shape.gradients.chunk, dtype == torch.float32
    chunks, blocks, halves = padded // chunk, padded // shape.flows.chunk, shape.flows.chunk // chunk
    parts = _parts(batch * chunks * groups, heads // groups, n_processors)
    flow_parts = _parts((2 * halves + 3) * batch * blocks * groups, heads // groups, 2 * n_processors)
    enough = PROGRAMS_PER_PROCESSOR * n_processors
    forth, back = (given[1], given[2]), (given[0], given[3])
    BC_strides = (0, *B_grad[:3]) if parts == 1 else _strides(B_shape)
    written = (*given, x_grad, BC_strides)
    return Plan(
        workspace_sizes(x_shape, B_shape, dtype, padded, chunk, halves, parts, with_starts),
        (3 * halves + 3) * batch * heads * padded,
        walk_launch(
            *(x_shape, B_shape, forth, back, not with_starts, 1, enough, exact, chunk, chunks, shape.states),
        ),
        _flows_launch(x_shape, B_shape, tuple(given), flow_parts, blocks, exact, chunk, shape.flows),
        _gradients_launch(x_shape, B_shape, written, parts, chunks, exact, shape.gradients),
        None if parts == 1 else _sum_BC_launch(B_shape, B_grad, parts),
    )


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


def _sum_BC_launch(B_shape: torch.Size, strides: tuple[int, ...], parts: int) -> Launch:
    """strides: of the gradients of B and C."""
    from kernels.ssd.backward_kernels import sum_BC_kernel

    batch, length, groups, states = B_shape
    n = block(states)
    rows = max(1, SUM_BLOCK // n)
    numbers = (*strides[:3], batch * length, length, states, parts)
    return Launch(sum_BC_kernel, (-(-batch * length // rows), 2 * groups), numbers, (rows, n), SUM_WARPS)


def _strides(B_shape: torch.Size) -> tuple[int, ...]:
    """Of parts (part, batch, length, group, state), but for the last one."""
    return tuple(math.prod(B_shape[axis:]) for axis in range(4))


def _parts(programs: int, heads: int, n_processors: int) -> int:
    """In how many parts the heads of a group are divided, so that the programs' last wave does not leave many idle."""

    def time(parts: int) -> int:
        return -(-programs * parts // n_processors) * (-(-heads // parts) + PART_COST)

    parts = min(range(1, heads + 1), key=time)
    return -(-heads // -(-heads // parts))  # none without heads
