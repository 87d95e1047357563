"""Which kernel runs for which shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SCALAR_BYTES = (4, 2, 2)  # of fp32, fp16, bf16: the order of DTYPE in common.cuh
MAX_STATES = 256
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
        gate = block if gated else 1
        sizes = [4 * self.block_channels] * 2
        if self.chunk:
            chunks = max(1, self.tile // self.chunk - 1)
            vector = min(4, self.warp_channels)
            sizes += [4 * self.tile * self.padded_states] * 2 + [4 * self.tile]
            sizes += [2 * block * scalars, block * scalars, block * scalars, gate * scalars, gate * scalars]
            sizes += [4 * block] * 4
            sizes += [4 * chunks * self.channels * self.per_lane * self.threads]
            sizes += [4 * self.warps * self.tile * 2 * self.padded_states, 4 * 2 * self.threads * vector]
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
        return macros | ({"CHUNK": self.chunk} if self.chunk else {})


def padded(states: int) -> int:
    """States are padded to a power of two from 4 on: lanes hold four of them, or eight."""
    return max(4, 1 << (states - 1).bit_length())


def tile_steps(states: int) -> int:
    """Time steps between two states that the forward saves, which is the tile of both kernels."""
    return 16 if padded(states) <= 64 else 8


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
#   forward   wide                    0.287           1.529           0.493           0.601            0.728
#             narrow                  0.217           1.367           0.536           0.666            0.789
#   backward  wide, 3 at once         0.903           4.560           1.775           2.023            2.349
#             wide, 4 at once         0.991           4.910           1.592           2.229            2.442
#             narrow, 4 at once       0.788           6.006           1.884           2.489            2.856
#             narrow, 5 at once       0.834           4.832           1.911           2.444            2.942
#
# Four wide backward blocks on a multiprocessor spill registers: worth it only where that saves a second round.


def forward_variant(states: int, batch: int, channels: int, processors: int) -> Variant:
    """The forward kernel for a shape."""
    if padded(states) != 16:
        return Variant(**_shape(states, 2), min_blocks=3)
    wide = Variant(**_shape(states, 2), min_blocks=5)
    if batch * wide.groups(channels) >= 3 * processors:
        return wide
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
