"""What SSD's forward keeps for its backward on CUDA devices besides its arguments: one fp32 tensor, in parts.

The decays, the states before chunks in the activations' dtype, and the initial state where one was given. The backward
computes again what is not there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.launcher import Piece, pieces, remembered

if TYPE_CHECKING:
    from kernels.ssd.launch import Shapes


class Kept(NamedTuple):
    """The parts that are there."""

    decays: Piece | None
    states: Piece | None  # (batch, chunk, head, state, head_dim), flat
    initial: Tensor | None  # (batch, head, head_dim, state), flat


class Layout(NamedTuple):
    """fp32 numbers of the first two parts."""

    decays: int
    states: int
    decays_shape: tuple[int, ...]  # (plane, batch, head, length in whole chunks and blocks of the backward)


def numbers(layout: Layout, initial: Tensor | None) -> int:
    """How many fp32 numbers are kept."""
    return layout.decays + layout.states + (0 if initial is None else initial.numel())


def cut(x: Tensor, kept: Tensor, layout: Layout) -> Kept:
    """The parts."""
    total, first = kept.numel(), layout.decays + layout.states
    if not total:
        return Kept(None, None, None)
    decays, states = pieces(kept, (layout.decays, layout.states), (torch.float32, x.dtype))
    return Kept(
        decays if layout.decays else None,
        states if layout.states else None,
        kept[first:] if total > first else None,
    )


def layout_of(x_shape: torch.Size, dtype: torch.dtype, n_states: int, shapes: Shapes) -> Layout:
    """No decays or states where the backward has other chunks, no states where it has other blocks of them."""
    chunk = shapes.forward.chunk
    decays = decays_shape(x_shape, dtype, chunk, shapes)
    if chunk != shapes.gradients.chunk:
        return Layout(0, 0, decays)
    if n_states > min(shapes.forward.states, shapes.gradients.states):
        return Layout(math.prod(decays), 0, decays)
    n_bytes = math.prod(decays[1:]) // chunk * x_shape[3] * n_states * dtype.itemsize
    # Multiples of 4, so that the next part begins at an address that Triton takes for aligned.
    return Layout(math.prod(decays), -(-n_bytes // 16) * 4, decays)


layout = remembered(layout_of)  # for sizes that are numbers, not symbols


def decays_shape(x_shape: torch.Size, dtype: torch.dtype, chunk: int, shapes: Shapes) -> tuple[int, ...]:
    """See `Layout`."""
    batch, length, heads, _ = x_shape
    block = max(chunk, shapes.flows.chunk)
    return 6 if dtype == torch.float32 else 4, batch, heads, -(-length // block) * block
