"""Which kernel runs for which shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SCALAR_BYTES = (4, 2, 2)  # of fp32, fp16, bf16: the order of DTYPE in common.cuh
MAX_STATES = 256
SEGMENT_STEPS = 256  # a few microseconds to begin one, a hundred and more to compute it
FREE_PARTS_BYTES = 2**30  # of the parts of dB and dC that blocks leave to be summed; more only beside large inputs


@dataclass(frozen=True)
class Variant:
    """How a block divides its work; common.cuh names the fields."""

    padded_states: int
    per_lane: int
    channels: int
    warps: int
    tile: int
    min_blocks: int
    chunk: int = 0  # backward only: steps whose states are in registers at once
    save: int = 0  # forward only: steps between two saved states where that is not the tile

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def warp_channels(self) -> int:
        return 32 * self.per_lane // self.padded_states * self.channels

    @property
    def block_channels(self) -> int:
        return self.warps * self.warp_channels

    def groups(self, channels: int) -> int:
        """Blocks that one sequence needs."""
        return math.ceil(channels / self.block_channels)

    def shared_bytes(self, dtype: int, gated: bool) -> int:
        """The size of `struct Shared` in forward.cu, or backward.cu when there are chunks."""
        block = self.tile * self.block_channels
        scalars = SCALAR_BYTES[dtype]
        span = block + self.warps * max(self.warp_channels, 128 // self.warps // scalars)
        gate = span if gated else 1
        sizes = [4 * self.block_channels] * 2
        if self.chunk:
            chunks = max(1, self.tile // self.chunk - 1)
            vector = min(4, self.warp_channels)
            sizes += [4 * self.tile * self.padded_states] * 2 + [4 * self.tile]
            sizes += [2 * span * scalars, span * scalars, span * scalars, gate * scalars, gate * scalars]
            sizes += [4 * block] * 3 + [4 * (block + self.warp_channels)]
            sizes += [4 * chunks * self.channels * self.per_lane * self.threads]
            sizes += [4 * self.warps * self.tile * 2 * self.padded_states, 4 * 2 * self.threads * vector, 4]
        else:
            sizes += [8 * self.tile * self.padded_states] * 2 + [8 * self.tile]
            sizes += [2 * span * scalars, 2 * span * scalars, 2 * gate * scalars, 4 * block, 4 * block]
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
        return macros | ({"CHUNK": self.chunk} if self.chunk else {"SAVE": self.save or self.tile})


def padded(states: int) -> int:
    """States are padded to a power of two from 4 on: lanes hold four of them, or eight."""
    return max(4, 1 << (states - 1).bit_length())


def tile_steps(states: int) -> int:
    """Time steps between two states that the forward saves, which is the tile of both kernels."""
    return 16 if padded(states) <= 64 else 8


def segments(units: int, length: int, states: int, processors: int) -> int:
    """Into how many segments of time the backward cuts a unit of its work, for blocks to share it evenly."""
    if units <= processors:
        return 1
    tiles = math.ceil(length / tile_steps(states))
    return math.ceil(tiles * tile_steps(states) / SEGMENT_STEPS)


def _shape(states: int, channels: int) -> dict[str, int]:
    n = padded(states)
    return {
        "padded_states": n,
        "per_lane": 8 if n == 256 else 4,
        "channels": 2 if n >= 128 else 1 if n <= 8 else channels,
        "warps": 2 if n >= 128 else 4,
        "tile": tile_steps(states),
    }


# Milliseconds on an H100 (132 multiprocessors), bf16, 16 states, at (batch, length, channels); "wide" has two channels
# per lane and needs fewer instructions, "narrow" one per lane and fills the GPU with fewer channels.
#
#                          (8, 2048, 1536) (4, 8192, 5120) (8, 2048, 4096) (8, 2048, 5120) (32, 2048, 1536)
#   wide blocks for 132 multiprocessors 192             320             512             640              768
#   forward   wide, 5 at once         0.299           1.538           0.487           0.594            0.727
#             wide, 6 at once         0.302           1.563           0.499           0.615            0.712
#             narrow, 5 at once       0.225           1.361           0.534           0.660            0.775
#             narrow, 6 at once       0.235           1.421           0.549           0.673            0.788
#   backward  wide, 3 at once         0.864           4.531           1.688           1.974            2.297
#             wide, 4 at once         1.074           5.172           1.621           2.346            2.584
#             narrow, 4 at once       0.779           5.323           1.878           2.411            2.833
#             narrow, 5 at once       0.873           5.118           1.995           2.471            3.025
#             wide, 10 warps, 1       1.133           4.564           2.247           2.261            3.381
#             wide, 5 warps, 2        1.150           4.573           2.256           2.278            2.956
#
# Six wide forward blocks on a multiprocessor hold fewer registers, and four wide backward blocks spill some: worth it
# only where that saves a second round.


def forward_variant(states: int, batch: int, channels: int, processors: int) -> Variant:
    """The forward kernel for a shape."""
    if padded(states) != 16:
        return Variant(**_shape(states, 2), min_blocks=3)
    wide = Variant(**_shape(states, 2), min_blocks=5)
    blocks = batch * wide.groups(channels)
    if blocks >= 3 * processors:
        return replace(wide, min_blocks=6) if 5 * processors < blocks <= 6 * processors else wide
    return Variant(**_shape(states, 1), min_blocks=5)


def backward_variant(states: int, batch: int, channels: int, processors: int) -> Variant:
    """The backward kernel for a shape."""
    if padded(states) != 16:
        chunk = 2 if padded(states) == 256 else 4
        return Variant(**_shape(states, 2), min_blocks=3 if states <= 8 else 2, chunk=chunk)
    wide = Variant(**_shape(states, 2), min_blocks=3, chunk=4)
    blocks = batch * wide.groups(channels)
    if blocks < 2 * processors:
        return Variant(**_shape(states, 1), min_blocks=4, chunk=4)
    return replace(wide, min_blocks=4) if 3 * processors < blocks <= 4 * processors else wide
