"""What the kernels of SSD's backward leave for each other: one fp32 tensor, in parts, as each allocation takes time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launcher import Piece, pieces, remembered


class Workspace(NamedTuple):
    """Of one block of states; fp32 but for the last two, which have the dtype of the activations."""

    sums: Piece  # these three of `flows_kernel`
    own_products: Piece
    through: Piece
    owns: Piece  # (batch, head, padded)
    parts: Piece  # of the gradients of A, dt_bias and D, by `delta_kernel`
    scratch: Piece
    B_parts: Piece  # empty unless the heads of a group are divided
    C_parts: Piece
    end_grads: Piece  # (batch, chunk, head, state, head_dim)
    starts: Piece  # the same; empty where the forward kept them


def workspace(x: Tensor, B: Tensor, padded: int, chunk: int, halves: int, parts: int, with_starts: bool) -> Workspace:
    """padded: the length in whole blocks of `halves` chunks; parts: of the heads of a group."""
    sizes, dtypes = _sizes(x.shape, B.shape, x.dtype, padded, chunk, halves, parts, with_starts)
    return Workspace(*pieces(torch.empty(sum(sizes), dtype=torch.float32, device=x.device), sizes, dtypes))


@remembered
def _sizes(
    x_shape: torch.Size,
    B_shape: torch.Size,
    dtype: torch.dtype,
    padded: int,
    chunk: int,
    halves: int,
    parts: int,
    with_starts: bool,
) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
    """fp32 numbers, and what they are read as; multiples of 4, as Triton takes such parts' addresses for aligned."""
    (batch, _, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    chunks, blocks = padded // chunk, padded // (chunk * halves)
    BC_parts = parts * math.prod(B_shape) if parts > 1 else 0
    all_states = -(-batch * chunks * heads * states * head_dim * dtype.itemsize // 4)
    sizes = (
        (3 * halves + 4) * batch * heads * padded,
        batch * groups * padded,
        batch * heads * blocks,
        batch * heads * padded,
        batch * blocks * 3 * heads,
        batch * chunks * groups * parts * chunk * chunk,
        BC_parts,
        BC_parts,
        all_states,
        all_states if with_starts else 0,
    )
    wide = len(sizes) - 2
    return tuple(-(-size // 4) * 4 for size in sizes), (torch.float32,) * wide + (dtype, dtype)
