"""Which kernel runs for which shape."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

SCALAR_BYTES = (4, 2, 2)  # of fp32, fp16, bf16: the order of DTYPE in common.cuh
MAX_STATES = 256
SEGMENT_STEPS = 256  # a few microseconds to begin one, a hundred and more to compute it
LEAST_TILES = 8  # of a segment that is done beside others
MOST_SEGMENTS = 128  # done side by side: the last one begins by going through what all others have left
FREE_PARTS_BYTES = 2**30  # of the parts of dB and dC that blocks leave to be summed; more only beside large inputs


class SideBySide(NamedTuple):
    """When segments of time are done side by side, which takes a second walk through it, and how many."""

    least_fill: int  # the GPU has room for so many times the blocks that one segment has
    least_segments: int
    rounds: int  # so many times as many segments as fill the GPU, if long enough: these share it more evenly


FORWARD = SideBySide(least_fill=9, least_segments=4, rounds=2)
BACKWARD = SideBySide(least_fill=3, least_segments=2, rounds=6)


class Chained(NamedTuple):
    """When the warps of a forward take turns in time: rings (16 channels) for each multiprocessor, steps."""

    least: float
    most: float
    steps: int


CHAINED = Chained(least=0.7, most=2.5, steps=512)


@dataclass(frozen=True)
class Variant:
    """How a block divides its work; common.cuh names the fields."""

    source: str  # forward, chained, backward or ends
    padded_states: int
    per_lane: int
    channels: int
    warps: int
    tile: int
    min_blocks: int
    chunk: int = 0  # backward only: steps whose states are in registers at once
    reverse: bool = False  # ends only
    rings: int = 1  # chained only: groups of channels, each with its share of the warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @functools.cached_property
    def warp_channels(self) -> int:
        return 32 * self.per_lane // self.padded_states * self.channels

    @property
    def block_channels(self) -> int:
        """Warps of `chained` have the same channels as the others of their ring."""
        return self.warp_channels * (self.rings if self.source == "chained" else self.warps)

    def vectors(self, dtype: int) -> tuple[int, int]:
        """What the start of a row must be a multiple of to be copied in vectors (COPY_BYTES): bytes, elements."""
        row = self.warp_channels * SCALAR_BYTES[dtype]
        size = next(size for size in (16, 8, 4) if row % size == 0)
        return size, max(size // SCALAR_BYTES[dtype], min(4, self.warp_channels))

    def state_vectors(self, dtype: int) -> tuple[int, int]:
        """The same for the rows of B and C, where these are copied in vectors."""
        size = min(16, self.padded_states * SCALAR_BYTES[dtype])
        return size, size // SCALAR_BYTES[dtype]

    def groups(self, channels: int) -> int:
        """Blocks that one sequence needs."""
        return math.ceil(channels / self.block_channels)

    @functools.cache  # noqa: B019  variants are few
    def shared_bytes(self, dtype: int, gated: bool) -> int:
        """The size of `struct Shared` in the source."""
        block = self.tile * self.block_channels
        warp = self.tile * self.warp_channels
        scalars = SCALAR_BYTES[dtype]
        gate = block if gated else 1
        sizes = [4 * self.block_channels] * 2
        if self.source == "ends":
            sizes = [4 * self.block_channels, 8 * self.tile * self.padded_states, 8 * self.tile]
            sizes += [2 * block * scalars, 2 * block * scalars, 2 * gate * scalars, 4 * block, 4 * block]
        elif self.source == "chained":
            lane = self.channels * self.per_lane
            sizes = [2 * (4 + gated) * warp * scalars, 4 * 4 * warp, 8 * self.tile, 4 * lane * 32]
            return self.warps * sum(-(-size // 16) * 16 for size in sizes)
        elif self.source == "backward":
            chunks = max(1, self.tile // self.chunk - 1)
            vector = min(4, self.warp_channels)
            sizes += [4 * self.tile * self.padded_states] * 2 + [4 * self.tile]
            sizes += [2 * block * scalars, block * scalars, block * scalars, gate * scalars, gate * scalars]
            sizes += [4 * block] * 3 + [4 * (block + self.warp_channels)]
            sizes += [4 * chunks * self.channels * self.per_lane * self.threads]
            sizes += [4 * self.warps * self.tile * 2 * self.padded_states, 4 * 2 * self.threads * vector, 4]
        else:
            sizes += [8 * self.tile * self.padded_states] * 2 + [8 * self.tile]
            sizes += [2 * block * scalars, 2 * block * scalars, 2 * gate * scalars, 4 * block, 4 * block]
        return sum(-(-size // 16) * 16 for size in sizes)

    def macros(self, dtype: int, gated: bool, packed: bool, aligned: bool) -> dict[str, int]:
        """What the sources expect to be defined."""
        macros = {
            "DTYPE": dtype,
            "STATES": self.padded_states,
            "PER_LANE": self.per_lane,
            "CHANNELS": self.channels,
            "WARPS": self.warps,
            "TILE": self.tile,
            "MIN_BLOCKS": self.min_blocks,
            "GATED": int(gated),
            "PACKED": int(packed),
            "ALIGNED": int(aligned),
            "SHARED_BYTES": self.shared_bytes(dtype, gated),
        }
        own = {
            "backward": {"CHUNK": self.chunk},
            "ends": {"REVERSE": int(self.reverse)},
            "chained": {"SAVE_EVERY": tile_steps(self.padded_states) // self.tile, "RINGS": self.rings},
        }
        return macros | own.get(self.source, {})


def padded(states: int) -> int:
    """States are padded to a power of two from 4 on: lanes hold four of them, eight or sixteen."""
    return max(4, 1 << (states - 1).bit_length())


def tile_steps(states: int) -> int:
    """Time steps between two states that the forward saves, which is the tile of both kernels."""
    return 16 if padded(states) <= 64 else 8


def _variant(
    source: str, states: int, channels: int, min_blocks: int, chunk: int = 0, reverse: bool = False
) -> Variant:
    n = padded(states)
    return Variant(
        source,
        padded_states=n,
        per_lane=8 if n == 256 else 4,
        channels=2 if n >= 128 else 1 if n <= 8 else channels,
        warps=2 if n >= 128 else 4,
        tile=tile_steps(states),
        min_blocks=min_blocks,
        chunk=chunk,
        reverse=reverse,
    )


# Milliseconds on an H100 (132 multiprocessors), bf16, 16 states, at (batch, length, channels); "wide" has two channels
# per lane and needs fewer instructions, "narrow" one per lane and fills the GPU with fewer channels.
#
#                        (8, 2048, 1536) (4, 8192, 5120) (8, 2048, 4096) (8, 2048, 5120) (32, 2048, 1536)
#   wide blocks                       192             320             512             640              768
#   forward   wide, 5 at once       0.289           1.468           0.480           0.587            0.700
#             wide, 6 at once       0.305           1.538           0.500           0.611            0.714
#             narrow, 5 at once     0.226           1.362           0.533           0.664            0.784
#             narrow, 6 at once     0.242           1.430           0.559           0.677            0.808
#   backward  wide, 2 at once       0.830           4.253           1.748           2.139            2.565
#             wide, 3 at once       0.901           4.153           1.541           1.885            2.234
#             wide, 4 at once       1.187           5.204           1.662           2.013            2.392
#             narrow, 4 at once     0.844           4.625           1.841           2.309            2.758
#             narrow, 5 at once     0.952           5.015           1.891           2.385            2.931
#   without segments of time:
#             wide, 3 at once       0.871           4.491           1.696           1.990            2.293
#             narrow, 4 at once     0.776           5.165           1.889           2.378            2.862
#
# Segments of 64 steps were 8 to 11% slower than those of 256, of 128 2 to 4%, of 512 within 1.5%, of 1024 up to 6%.
#
# Segments side by side, both walks, and warps that take turns in time ("chained"), at (1, 2048, 5120), (1, 32768, 5120)
# and (1, 131072, 2048); first the number of segments. "Lane" has one channel per lane with all its states; places are
# 660, 528 and 528, and 396 in the backward.
#
#   forward   chained, 1 ring           0.108           1.512           2.396
#             the same, saving states   0.127           2.166           2.523
#             wide, 5 at once       1   0.192       1   2.994
#             wide, 5 at once       8   0.141       8   2.027      20   3.037
#             wide, 5 at once      16   0.150      32   1.900      80   3.175
#             lane, 4 at once      13   0.139      13   1.904      33   3.021
#             lane, 4 at once      26   0.155      26   1.857      66   2.968
#   backward  wide, 3 at once       1   0.645       1   9.840
#             wide, 3 at once       4   0.369       4   5.312      12   7.596
#             wide, 3 at once       8   0.342       8   4.761      24   7.459
#             wide, 3 at once      24   0.386      24   4.565      72   7.371
#             narrow, 4 at once     9   0.388       9   5.431      48   8.581


# For 16 states; with others a block takes as many registers as it needs.
FORWARD_BLOCKS, BACKWARD_BLOCKS = 5, 3


@functools.cache
def forward_variant(states: int, batch: int, channels: int, processors: int) -> Variant:
    """The forward kernel for a shape whose time is one segment."""
    wide = _wide_forward(states)
    if padded(states) != 16 or batch * wide.groups(channels) >= 3 * processors:
        return wide
    return _variant("forward", states, 1, min_blocks=5)


@functools.cache
def backward_variant(states: int, batch: int, channels: int, processors: int) -> Variant:
    """The backward kernel for a shape whose segments of time, if there are several, are done in turn."""
    wide = _wide_backward(states)
    if padded(states) != 16 or batch * wide.groups(channels) >= 2 * processors:
        return wide
    return _variant("backward", states, 1, min_blocks=4, chunk=4)


def ends_variant(states: int, reverse: bool) -> Variant:
    """The kernel that finds out what segments of time make of the states that enter them."""
    return _variant("ends", states, 2, 5 if padded(states) == 16 else 3, reverse=reverse)


def _wide_forward(states: int) -> Variant:
    return _variant("forward", states, 2, FORWARD_BLOCKS if padded(states) == 16 else 3)


def _wide_backward(states: int) -> Variant:
    chunk = 2 if padded(states) == 256 else 4
    min_blocks = BACKWARD_BLOCKS if padded(states) == 16 else 3 if states <= 8 else 2
    return _variant("backward", states, 2, min_blocks, chunk)


def chained_variant(batch: int, channels: int, processors: int) -> Variant:
    """The forward kernel for 16 states whose warps take turns in time.

    Two rings of neighbouring channels in one block touch the same 64 bytes of memory at about the same time; one where
    two would leave multiprocessors without a block.
    """
    kinds = [
        Variant("chained", 16, per_lane=4, channels=2, warps=12, tile=8, min_blocks=1, rings=rings) for rings in (2, 1)
    ]
    return next((v for v in kinds if batch * v.groups(channels) >= 0.95 * processors), kinds[-1])


def forward_plan(states: int, batch: int, length: int, channels: int, processors: int) -> tuple[Variant, int]:
    """The forward kernel for a shape, and into how many segments of time its blocks are cut, done side by side."""
    n = padded(states)
    rings = batch * math.ceil(channels / 16) / processors
    if n == 16 and CHAINED.least <= rings <= CHAINED.most and CHAINED.steps <= length < 2**31 // batch:
        return chained_variant(batch, channels, processors), 1
    beside = Variant("forward", n, min(n, 16), channels=1, warps=4, tile=tile_steps(states), min_blocks=4)
    count = _side_by_side(beside, batch, length, channels, processors, FORWARD)
    return (forward_variant(states, batch, channels, processors), 1) if count == 1 else (beside, count)


def backward_plan(states: int, batch: int, length: int, channels: int, processors: int) -> tuple[Variant, int]:
    """The backward kernel for a shape, and how many segments are done side by side; with 1, see `segments`."""
    beside = _wide_backward(states)
    count = _side_by_side(beside, batch, length, channels, processors, BACKWARD)
    return (backward_variant(states, batch, channels, processors), 1) if count == 1 else (beside, count)


def _side_by_side(variant: Variant, batch: int, length: int, channels: int, processors: int, choice: SideBySide) -> int:
    """How many segments, each worth its beginning; 1 where what one does not use is too little for a second walk."""
    fill = processors * variant.min_blocks // (batch * variant.groups(channels))
    tiles = math.ceil(length / variant.tile)
    if fill < choice.least_fill or tiles < choice.least_segments * LEAST_TILES:
        return 1
    rounds = min(choice.rounds, tiles // (2 * LEAST_TILES * fill))
    return min(rounds * fill if rounds > 1 else min(fill, tiles // LEAST_TILES), MOST_SEGMENTS)


def segments(units: int, length: int, states: int, processors: int, at_once: int) -> int:
    """Into how many segments of time the backward cuts each unit of its work, for blocks to share the whole evenly.

    at_once: blocks that a multiprocessor gets. One segment where the units are even enough: few on each
    multiprocessor, which then has room to spare, or nearly as many as there are places.
    """
    places = processors * at_once
    if units <= 2 * processors or 0.9 * places < units <= places:
        return 1
    tiles = math.ceil(length / tile_steps(states))
    return math.ceil(tiles * tile_steps(states) / SEGMENT_STEPS)
