"""Files that feed several lanes of one process, read once for all of them.

Where there are fewer files than lanes, lanes take the documents of a file in turn and get on about equally fast.
Without this each of them would decompress (or download) the whole file for its own part. Here the lane that needs a
document first reads up to it, and what it passes waits for the others. A lane that has fallen so far behind that too
much waits for it reads the file by itself from then on: the documents are the same in any case.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from mamba_train.data.lanes import Cursor, LaneOrder, Piece
from mamba_train.data.text_files import BadDocument, Part, TextRecord

HELD_BYTES = 256 << 20  # text of one file that may wait for slower lanes

Records = Iterator[TextRecord | BadDocument]
Read = Callable[[int, Part], Records]  # a part of the file of this number


class SharedReads:
    """The documents of one source for the lanes of this process, which begin at `cursors`."""

    def __init__(self, order: LaneOrder, cursors: Mapping[int, Cursor], read: Read) -> None:
        self._order, self._read = order, read
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._lock = threading.Lock()
        # By file: the residues of its parts that are read here, and the place of each.
        self._starts: dict[int, dict[int, Cursor]] = {}
        if order.n_files < order.n_lanes:  # otherwise lanes come to what they share at different times
            for lane, cursor in cursors.items():
                (piece,) = order.pieces(lane, 0)
                self._starts.setdefault(piece.file, {})[piece.residue] = cursor

    def read(self, piece: Piece, epoch: int, document: int) -> Records:
        """The documents of a piece in an epoch, from one of its own on. Raises ValueError as `read_texts` does."""
        part = _part(piece.stride, {piece.residue: document})
        if len(self._starts.get(piece.file, ())) < 2:
            yield from self._read(piece.file, part)
            return
        shared = self._pass(piece, epoch)
        next_number = part.first
        while (record := shared.take(piece.residue)) is not None:
            next_number = record.number + 1
            yield record
        if shared.has_dropped(piece.residue):
            yield from self._read(piece.file, Part(part.stride, part.residues, next_number))
        with self._lock:
            shared.n_readers -= 1
            if not shared.n_readers:
                del self._passes[piece.file, epoch]

    def _pass(self, piece: Piece, epoch: int) -> "_Pass":
        """The reading of a file in an epoch, for all lanes that have come to it or will."""
        with self._lock:
            if (piece.file, epoch) not in self._passes:
                block = self._order.block
                firsts = {
                    residue: cursor.document // block * block if cursor.epoch == epoch else 0
                    for residue, cursor in self._starts[piece.file].items()
                    if cursor.epoch <= epoch
                }
                records = self._read(piece.file, _part(piece.stride, firsts))
                self._passes[piece.file, epoch] = _Pass(records, piece.stride, firsts)
            return self._passes[piece.file, epoch]


def _part(stride: int, firsts: Mapping[int, int]) -> Part:
    """Residues of a file, each from one of its own documents on, or from earlier."""
    return Part(stride, frozenset(firsts), min(1 + residue + stride * first for residue, first in firsts.items()))


class _Pass:
    """One reading of a file: documents that were passed wait for the lane whose they are."""

    def __init__(self, records: Records, stride: int, firsts: Mapping[int, int]) -> None:
        self.n_readers = len(firsts)
        self._records, self._stride = records, stride
        self._firsts = {residue: 1 + residue + stride * first for residue, first in firsts.items()}
        self._waiting: dict[int, deque[TextRecord | BadDocument]] = {residue: deque() for residue in firsts}
        self._n_bytes, self._n_bytes_of_all = dict.fromkeys(firsts, 0), 0
        self._failure: ValueError | None = None
        self._lock = threading.Lock()

    def has_dropped(self, residue: int) -> bool:
        """Whether too much waited for a lane, so that it has to read by itself."""
        return residue not in self._waiting

    def take(self, residue: int) -> TextRecord | BadDocument | None:
        """The next document of a residue; None at the end, or if it was dropped."""
        with self._lock:
            waiting = self._waiting.get(residue)
            if waiting is None:
                return None
            if not waiting:
                return self._advance(residue)
            record = waiting.popleft()
            self._count(residue, -_size(record))
            return record

    def _advance(self, residue: int) -> TextRecord | BadDocument | None:
        if self._failure is not None:
            raise self._failure
        try:
            for record in self._records:
                owner = (record.number - 1) % self._stride
                if owner not in self._waiting or record.number < self._firsts[owner]:
                    continue
                if owner == residue:
                    return record
                self._waiting[owner].append(record)
                self._count(owner, _size(record))
                if self._n_bytes_of_all > HELD_BYTES:
                    self._drop_the_slowest()
        except ValueError as error:  # for the other lanes this must not look like the end of the file
            self._failure = error
            raise
        return None

    def _drop_the_slowest(self) -> None:
        slowest = max(self._n_bytes, key=lambda residue: self._n_bytes[residue])
        del self._waiting[slowest]
        self._n_bytes_of_all -= self._n_bytes.pop(slowest)

    def _count(self, residue: int, n_bytes: int) -> None:
        self._n_bytes[residue] += n_bytes
        self._n_bytes_of_all += n_bytes


def _size(record: TextRecord | BadDocument) -> int:
    return record.n_bytes if isinstance(record, TextRecord) else len(record.problem)
