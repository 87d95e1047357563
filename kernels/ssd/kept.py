"""What SSD's forward keeps for its backward on CUDA devices besides its arguments: one fp32 tensor, in parts.

The decays, the states before chunks in the activations' dtype, and the initial state where one was given. The backward
computes again what is not there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.ssd.launch import Shapes


class Kept(NamedTuple):
    """The parts that are there."""

    decays: Tensor | None
    states: Tensor | None  # (batch, chunk, head, state, head_dim), flat
    initial: Tensor | None


def decays_shape(x: Tensor, chunk: int, shapes: Shapes) -> tuple[int, ...]:
    """(plane, batch, head, length in whole chunks and blocks of the backward)."""
    batch, length, heads = x.shape[:3]
    block = max(chunk, shapes.flows.chunk)
    return 6 if x.dtype == torch.float32 else 4, batch, heads, -(-length // block) * block


def numbers(x: Tensor, B: Tensor, initial: Tensor | None, shapes: Shapes) -> int:
    """How many fp32 numbers are kept."""
    return sum(_sizes(x, B, shapes)) + (0 if initial is None else initial.numel())


def cut(x: Tensor, B: Tensor, kept: Tensor, shapes: Shapes) -> Kept:
    """Views of the parts."""
    if not kept.numel():
        return Kept(None, None, None)
    n_decays, n_states = _sizes(x, B, shapes)
    sizes = (n_decays, n_states, kept.numel() - n_decays - n_states)
    decays, states, initial = (part if part.numel() else None for part in torch.split_with_sizes(kept, sizes))
    return Kept(
        None if decays is None else decays.view(decays_shape(x, shapes.forward.chunk, shapes)),
        None if states is None else states.view(x.dtype),
        None if initial is None else initial.view(x.shape[0], *x.shape[2:], B.shape[3]),
    )


def _sizes(x: Tensor, B: Tensor, shapes: Shapes) -> tuple[int, int]:
    """fp32 numbers of the decays and the states: none where the backward has other chunks or blocks of states."""
    chunk, states = shapes.forward.chunk, B.shape[3]
    if chunk != shapes.gradients.chunk:
        return 0, 0
    decays = decays_shape(x, chunk, shapes)
    if states > min(shapes.forward.states, shapes.gradients.states):
        return math.prod(decays), 0
    n_bytes = math.prod(decays[1:]) // chunk * x.shape[3] * states * x.element_size()
    # Multiples of 4, so that the next part begins at an address that Triton takes for aligned.
    return math.prod(decays), -(-n_bytes // 16) * 4
