"""Parts of tensors: what one rank holds of the weights and of the optimiser's state, whatever shards them.

Every engine cuts a parameter into contiguous ranges of its elements, read row by row: FSDP2 between rows, ZeRO
anywhere. A file format knows rectangles only, so a range becomes up to three of them: the end of a row, whole rows,
the beginning of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a tensor.

    shape: of the whole tensor. start: how many elements come before the range. values: the range itself, 1-D; a view
    of live memory or a copy. saved_here: whether this rank saves it (other ranks may hold the same range).
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor
    saved_here: bool = True

    @classmethod
    def whole(cls, tensor: Tensor, saved_here: bool = True) -> "Piece":
        """All of a contiguous tensor, as a view."""
        return cls(tuple(tensor.shape), 0, tensor.detach().view(-1), saved_here)

    def of(self, whole: Tensor) -> Tensor:
        """The same range of another tensor of this shape (contiguous), as a view."""
        return whole.reshape(-1)[self.start : self.start + self.values.numel()]


@dataclass(frozen=True)
class Rectangle:
    """A block of a tensor: where it begins in each dimension, and its values in their shape (a view)."""

    offsets: tuple[int, ...]
    values: Tensor


@dataclass
class Pieces:
    """Weights and optimiser state as one rank holds them, keyed by parameter name.

    optimizer keys are `<parameter>.exp_avg`, `<parameter>.exp_avg_sq` and `<parameter>.step`.
    """

    model: dict[str, Piece]
    optimizer: dict[str, Piece] = field(default_factory=dict)

    @classmethod
    def whole(cls, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> "Pieces":
        """Of tensors that are not cut."""
        return cls(*({name: Piece.whole(t) for name, t in tensors.items()} for tensors in (model, optimizer)))

    def all(self) -> dict[str, Piece]:
        """Both kinds together."""
        return {**self.model, **self.optimizer}


def rectangles(piece: Piece) -> list[Rectangle]:
    """Cut a range into blocks; a whole tensor is one block, a part of a matrix up to three.

    Raises ValueError for a part of a tensor of three or more dimensions.
    """
    values, shape = piece.values, piece.shape
    start, end = piece.start, piece.start + values.numel()
    if values.numel() == torch.Size(shape).numel():
        return [Rectangle((0,) * len(shape), values.view(shape))]
    if not values.numel():
        return []
    if len(shape) == 1:
        return [Rectangle((start,), values)]
    if len(shape) != 2:
        raise ValueError(f"a part of a tensor of shape {shape} cannot be stored: expected at most 2 dimensions")
    width = shape[1]
    first_end = min(end, -(-start // width) * width)  # of a row that begins before the range
    last_start = max(first_end, end // width * width)  # of a row that ends after it
    found = []
    for low, high in ((start, first_end), (first_end, last_start), (last_start, end)):
        if low < high:
            rows = (high - low) // width or 1
            block = values[low - start : high - start].view(rows, -1)
            found.append(Rectangle((low // width, low % width), block))
    return found
