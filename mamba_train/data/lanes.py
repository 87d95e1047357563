"""Which files and documents each lane of a stream reads, and in which order: computed from the seed, not stored.

A lane is one of a fixed number of virtual streams. Files are dealt to the lanes once for the whole run: as many whole
ones to each as there are, and what is left over in parts, each part being every so many documents of a file. So all
lanes have about as much to read, however many files there are, and nothing is in two of them. A lane's epoch is its
own: it begins its files again when it has read them all.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mamba_train.data.order import ROUNDS, permute

STREAM_ORDER = "lanes-1"  # change it when this file gives another order


@dataclass(frozen=True)
class Piece:
    """What a lane reads of a file: documents number `residue`, `residue + stride`, ..., counted from 0."""

    file: int
    stride: int = 1
    residue: int = 0


class Cursor(NamedTuple):
    """Where a lane is: the next token is `token` of document `document` of piece `piece` in its epoch `epoch`.

    All from 0; documents in the order of reading. A lane that does not repeat ends with epoch 1.
    """

    epoch: int = 0
    piece: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class LaneOrder:
    """The order of one source: `n_files` files dealt to `n_lanes` lanes.

    shuffle_files: deal them, and read those of a lane, in an order drawn anew for each epoch, not in that of the list.
    block: documents are permuted inside blocks of so many consecutive ones of a piece; 1: not at all.
    """

    seed: int
    source: str
    n_files: int
    n_lanes: int
    shuffle_files: bool = False
    block: int = 1

    @property
    def n_pieces(self) -> int:
        """How many pieces a lane reads in an epoch."""
        return -(-self.n_files // self.n_lanes)

    def pieces(self, lane: int, epoch: int) -> list[Piece]:
        """What a lane reads in an epoch, in this order; an epoch of all lanes has each document once."""
        n_whole, n_left = divmod(self.n_files, self.n_lanes)
        dealt = [Piece(self._dealt(lane + turn * self.n_lanes)) for turn in range(n_whole)]
        if n_left:
            # Lanes next to each other share a file: they are mostly read by the same process (`shared_reads`).
            number = lane * n_left // self.n_lanes
            first, end = (-(-n * self.n_lanes // n_left) for n in (number, number + 1))
            dealt.append(Piece(self._dealt(n_whole * self.n_lanes + number), end - first, lane - first))
        if not self.shuffle_files:
            return dealt
        key = self._key("files", lane, epoch)
        return [dealt[place] for place in permute(np.arange(len(dealt)), len(dealt), key).tolist()]

    def documents(self, piece: Piece, epoch: int, block_number: int) -> list[int]:
        """The documents of one block of a piece in the order of reading, counted within the piece."""
        first = block_number * self.block
        if self.block == 1:
            return [first]
        key = self._key("documents", piece.file, piece.residue, epoch, block_number)
        return [first + place for place in permute(np.arange(self.block), self.block, key).tolist()]

    def line(self, lane: int, cursor: Cursor) -> int:
        """The line (or row) of the file, from 1, of the document that a cursor is in."""
        piece = self.pieces(lane, cursor.epoch)[cursor.piece]
        block, place = divmod(cursor.document, self.block)
        return 1 + piece.residue + piece.stride * self.documents(piece, cursor.epoch, block)[place]

    def _dealt(self, place: int) -> int:
        return int(self._deal[place]) if self.shuffle_files else place

    @functools.cached_property
    def _deal(self) -> np.ndarray:
        return permute(np.arange(self.n_files), self.n_files, self._key("deal"))

    def _key(self, *parts: object) -> bytes:
        text = "/".join(str(part) for part in (STREAM_ORDER, self.seed, self.source, *parts))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8 * ROUNDS).digest()
