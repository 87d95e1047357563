"""What the kernels of SSD's backward leave for each other: one fp32 tensor, in parts, as each allocation takes time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launcher import Piece, pieces


class Sums(NamedTuple):
    """What `delta_kernel` reads, and what it leaves; fp32."""

    of_flows: Piece  # these three of `flows_kernel`
    own_products: Piece
    through: Piece
    owns: Piece  # (batch, head, padded)
    parts: Piece  # of the gradients of A, dt_bias and D


class Workspace(NamedTuple):
    """Of one block of states; fp32 but for the last two, which have the dtype of the activations."""

    sums: Sums
    scratch: Piece
    B_parts: Piece  # empty unless the heads of a group are divided
    C_parts: Piece
    end_grads: Piece  # (batch, chunk, head, state, head_dim)
    starts: Piece  # the same; empty where the forward kept them


N_SUMS = len(Sums._fields)


class Sizes(NamedTuple):
    """fp32 numbers of each part and what they are read as, and numbers in all."""

    numbers: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    total: int


def workspace(sizes: Sizes, x: Tensor) -> Workspace:
    """A new one, where x is."""
    parts = pieces(torch.empty(sizes.total, dtype=torch.float32, device=x.device), sizes.numbers, sizes.dtypes)
    return Workspace(Sums(*parts[:N_SUMS]), *parts[N_SUMS:])


def added(total: Sums | None, sums: Sums) -> Sums:
    """The sums of another block of states added to what `flows_kernel` left of the others, in memory of their own.

    The rest of their workspace may go then. `owns` and `parts` are those of the first block.
    """
    if total is None:
        sizes = tuple([part.size for part in sums])
        whole = sums.of_flows.whole[: sum(sizes)].clone()
        return Sums(*pieces(whole, sizes, (torch.float32,) * N_SUMS))
    for so_far, part in zip(total[:3], sums[:3], strict=True):
        so_far.tensor().add_(part.tensor())
    return total


def workspace_sizes(
    x_shape: torch.Size,
    B_shape: torch.Size,
    dtype: torch.dtype,
    padded: int,
    chunk: int,
    halves: int,
    parts: int,
    with_starts: bool,
) -> Sizes:
    """padded: the length in whole blocks of `halves` chunks; parts: of the heads of a group.

    Multiples of 4, so that each part begins at an address that Triton takes for aligned.
    """
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
    numbers = tuple([-(-size // 4) * 4 for size in sizes])
    return Sizes(numbers, (torch.float32,) * (len(sizes) - 2) + (dtype, dtype), sum(numbers))
