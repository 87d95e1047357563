"""How the norms' kernels divide their work, by measurements on an H100."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """How a kernel divides its work."""

    rows: int  # that a program has at once
    block: int  # channels of a piece of a row, a power of two
    warps: int


class LoopShape(NamedTuple):
    """The same of a kernel whose programs walk over rows."""

    rows: int
    block: int
    warps: int
    programs: int  # of a multiprocessor
    stages: int  # rows that are on their way from memory at once


# Milliseconds on an H100, bf16, 16,384 rows or as told, of the best shapes and a few near them; shapes as (block,
# warps, programs, stages), one row at a time. Without the early start but where told.
#
#   add, forward     608  (128, 1) .0184   (256, 1) .0185   2 rows of (256, 2) .0189   (1024, 2) .0189   (7,328 rows)
#                    768  (256, 2) .0527   (1024, 2) .0528   (256, 1) .0530
#                   2560  (4096, 8) .1691   (1024, 4) .1698   (512, 4) .1700
#                   4400  (8192, 8) .1617   (8192, 16) .1623   (2048, 8) .1630   (1024, 8) .1636   (9,108 rows)
#                   5120  (8192, 16) .3354   (8192, 8) .3358   (2048, 8) .3371
#         with it   2512  2 rows of (4096, 16) .2203   (4096, 16) .2210   (4096, 8) .2212   (21,608 rows)
#                   3264  (4096, 32) .2630   2 rows of (4096, 16) .2638   (4096, 8) .2641   (20,000 rows)
#                   4088  (4096, 32) .3744   (4096, 16) .3771   (4096, 8) .3801   (22,747 rows)
#                   5120  (8192, 16) .3366   (8192, 8) .3378
#   gated, forward  1536  2 rows of (2048, 8) .0520   (2048, 4) .0521   (512, 4) .0523
#                   4096  (2048, 16) .1335   (1024, 4) .1341   (4096, 8) .1342
#                   5120  (2048, 16) .1659   (2048, 4) .1661   (1024, 8) .1667
#   add, backward    768  (1024, 8, 2, 3) .0837   4 rows of (256, 16, 1, 3) .0791
#                   2560  (1024, 4, 2, 2) .2444   (1024, 4, 1, 3) .2455   (512, 8, 2, 2) .2456
#   gated, backward 5120  (1024, 8, 1, 3) .3090   (2048, 8, 2, 3) .3104   (1024, 8, 3, 3) .3223


def forward_shape(size: int, gated: bool, plain: bool = False) -> Shape:
    """The forward kernel for groups of `size` channels: each program has its rows once."""
    block = piece(size)
    if size <= 1024:
        rows = max(4, 1024 // block) if size <= 512 else 2
        each = 16 if plain or (gated and not 256 < size <= 512) else 8  # channels of a thread, about
        return Shape(rows, block, _warps(rows * _padded(size, block) // 32 // each))
    if plain:
        return Shape(1, block, _warps(_padded(size, block) // 32 // 16))
    if gated and size <= 8192:
        if 2048 < size <= 4096:
            return Shape(rows=2, block=4096, warps=16)
        return Shape(1, _power_of_two(size), warps=8) if size > 1280 else Shape(2, block, warps=4)
    if 2048 < size <= 3072:
        return Shape(rows=2, block=4096, warps=16)
    if size <= 8192:
        warps = 32 if 3072 < size <= 4096 else 16 if size > 4608 else 8
        return Shape(rows=1, block=_power_of_two(size), warps=warps)
    return Shape(1, block, 16)


def backward_shape(size: int, gated: bool, row_bytes: int, shared_bytes: int) -> LoopShape:
    """The backward kernel for groups of `size` channels, which reads `row_bytes` for each channel of a row.

    shared_bytes: what a program may have of shared memory, where rows wait for their turn.
    """
    block = piece(size) if size > 8192 else min(piece(size), 1024)
    rows = max(1, 512 // block)
    row = rows * _padded(size, block)
    alone = size > (2048 if gated else 4096)  # one program has most of a multiprocessor's registers
    stages = 3 if gated or alone or size <= 1024 else 2
    stages = max(1, min(stages, 1 + shared_bytes // (row * row_bytes)))
    warps = 16 if size > 8192 else min(8, _warps(row // 256))
    return LoopShape(rows, block, warps, programs=1 if alone else 2, stages=stages)


def piece(size: int) -> int:
    """Channels of a piece: as many as possible where the last one leaves no more than a quarter of the lanes idle."""
    block = _power_of_two(size)
    while block > 256 and 3 * _padded(size, block) > 4 * size:
        block //= 2
    return block


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _warps(wanted: int) -> int:
    """A power of two, at most 16."""
    return min(16, 1 << max(0, wanted.bit_length() - 1))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
