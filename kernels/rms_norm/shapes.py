"""How the norms' kernels divide their work, by measurements on an H100."""

from __future__ import annotations

from typing import NamedTuple

MAX_SIZE = 16384  # channels that a program holds in registers


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


# What was measured on an H100, bf16: shapes as (rows, block, warps), in the forward with the early start. Forward of
# small tensors, in microseconds, the kernel of mamba_ssm in brackets:
#
#   add     2,048 x 768   [4.78]   (2, 1024, 8) 4.02   (4, 1024, 8) 4.16   (1, 1024, 8) 4.29   (1, 1024, 2) 4.99
#           1,154 x 928   [4.31]   (2, 1024, 4) 3.07   (2, 1024, 8) 3.76   (1, 1024, 2) 3.56   (4, 128, 4) 3.90
#           769 x 3,472   [7.42]   (1, 4096, 16) 6.93  (1, 4096, 32) 7.21  (1, 4096, 8) 7.13
#           250 x 4,400   [4.91]   (1, 1024, 8) 3.70   (1, 8192, 16) 3.90  (1, 8192, 8) 4.92
#   gated   1,154 x 928   [3.33]   (2, 256, 2) 2.70    (2, 1024, 4) 2.82   (4, 256, 4) 2.78    (1, 1024, 2) 3.28
#           1,647 x 1,616 [5.82]   (1, 2048, 8) 4.35   (2, 2048, 8) 4.69   (1, 2048, 4) 4.75
#           2,951 x 2,176 [14.5]   (1, 512, 4) 10.1    (1, 4096, 4) 11.4   (2, 4096, 16) 14.3
#           23,320 x 144  [16.1]   (8, 256, 4) 7.0     (4, 256, 2) 8.4     (2, 256, 2) 15.7
#           31,266 x 304  [24.6]   (4, 256, 4) 21.2    (8, 256, 8) 21.4    (4, 256, 8) 24.8
#   plain   4,096 x 768   [4.92]   (4, 256, 4) 3.54    (2, 256, 2) 3.66    (2, 1024, 4) 3.84   (1, 1024, 2) 5.85
#
# and of large ones, where memory is the limit:
#
#   add     16,384 x 768   [52.8]  (1, 1024, 8) 51.1   (2, 1024, 16) 51.1  (1, 1024, 2) 51.8
#           16,384 x 2,560 [170.3] (2, 4096, 16) 169.6 (1, 4096, 4) 170.7
#           29,531 x 2,896 [344.8] (2, 4096, 16) 344.8 (1, 4096, 4) 349.6
#           26,497 x 3,128 [334.8] (2, 4096, 16) 334.8 (1, 4096, 32) 336.4
#           3,393 x 3,928  [57.5]  (1, 4096, 32) 54.3  (2, 4096, 16) 56.2  (1, 4096, 8) 56.6   (1, 4096, 4) 58.8
#           16,384 x 5,120 [339.3] (1, 8192, 16) 337.2 (1, 8192, 32) 337.3
#   gated   24,982 x 704   [37.5]  (2, 1024, 4) 36.1   (1, 1024, 4) 36.0   (2, 256, 2) 37.8
#           16,384 x 1,536 [51.4]  (1, 2048, 8) 50.3   (2, 2048, 16) 50.3  (1, 2048, 4) 50.5
#           16,384 x 4,096 [134.4] (2, 4096, 16) 131.4 (2, 4096, 32) 131.6 (1, 4096, 8) 133.7
#           16,384 x 5,120 [171.6] (1, 8192, 8) 163.6  (1, 2048, 4) 164.8
#   plain   16,384 x 2,560 [58.1]  (2, 256, 2) 56.2    (1, 1024, 4) 57.3, not asking; (2, 4096, 16) 74.3
#
# Backward, in milliseconds at 16,384 rows, as (block, warps, programs, stages), a row at a time but where told:
#
#   add      768  (1024, 8, 2, 3) .0837   4 rows of (256, 16, 1, 3) .0791
#           2560  (1024, 4, 2, 2) .2444   (1024, 4, 1, 3) .2455   (512, 8, 2, 2) .2456
#   gated   5120  (1024, 8, 1, 3) .3090   (2048, 8, 2, 3) .3104   (1024, 8, 3, 3) .3223


def forward_shape(size: int, gated: bool, plain: bool = False) -> Shape:
    """The forward kernel for groups of `size` channels: each program has its rows once."""
    block, whole = piece(size), _power_of_two(size)
    if size <= 512:  # programs start 1.2 ns apart: about a thousand channels each, or they wait for that
        rows = max(4, _power_of_two(896 // size))
        return _shared_out(rows, size, block, 16 if gated or plain else 8)
    if plain:
        return Shape(2, 256, 2) if size <= 1024 else _shared_out(1, size, block, 16)
    if size <= 1024:
        return Shape(2, 1024, 4 if gated else 8)
    if size > 8192:
        return _shared_out(1, size, block, 16)
    if gated:
        if 1280 < size <= 2048 or size > 4096:
            return Shape(1, whole, 8)
        return Shape(2, block, 4) if size <= 1280 else Shape(1, block, 4) if size < 3072 else Shape(2, block, 16)
    if 2048 < size <= 3200:
        return Shape(2, whole, 16)
    return Shape(1, whole, 16 if size > 3200 else 8)


def _shared_out(rows: int, size: int, block: int, each: int) -> Shape:
    """With as many warps as give a thread some `each` channels."""
    return Shape(rows, block, _warps(rows * _padded(size, block) // 32 // each))


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
