"""One lane of a stream: from files to windows of tokens, with the place at which each window begins.

The place (`Cursor`) is all that a lane has to remember. To go on from it the lane opens the file again, counts lines
up to the document, encodes that document once more and leaves out the tokens that were read.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.encoders import Encoder, EncoderMismatch
from mamba_train.data.lanes import Cursor, LaneOrder, Piece
from mamba_train.data.shared_reads import SharedReads
from mamba_train.data.text_files import BadDocument, TextRecord

# Encoded at once for one lane, or one document that is longer: few at first, so that the first step comes soon.
FIRST_ENCODE_CHARACTERS = 1 << 14


class _Encoded(NamedTuple):
    cursor: Cursor  # of its first token
    ids: np.ndarray  # with the end of document


@dataclass(frozen=True)
class LaneText:
    """What the lanes of a source in one process have in common; `name_of` says how messages call a file."""

    order: LaneOrder
    reads: SharedReads
    name_of: Callable[[int], str]
    new_filter: Callable[[], BadDocumentFilter]
    encode_characters: int  # at once, later on
    repeat: bool


class Lane:
    """Windows of one lane, from a cursor on. Raises ValueError (file, line, reason) for what cannot be read."""

    def __init__(self, number: int, text: LaneText, cursor: Cursor, encoder: Encoder, eos_id: int) -> None:
        self.cursor = cursor
        self._number, self._text, self._encoder = number, text, encoder
        self._bad, self._bad_of_rest = text.new_filter(), text.new_filter()
        self._eos = np.array([eos_id])
        self._ready: deque[_Encoded] = deque()
        self._n_ready = -cursor.token  # tokens from the cursor on
        self._documents = self._encode()

    @property
    def n_left_out(self) -> int:
        """Documents that could not be used, so far."""
        return self._bad.totals().total() + self._bad_of_rest.totals().total()

    def begin(self) -> None:
        """Come to the cursor, which takes long in the middle of a large compressed file."""
        if not self._ready and (document := next(self._documents, None)) is not None:
            self._ready.append(document)
            self._n_ready += len(document.ids)

    def window(self, out: np.ndarray) -> int:
        """Fill the 1-D array `out` with the next window, of which the one after it shares a token; how many were there.

        Fewer than len(out) only at the end of a lane that does not repeat; then 0.
        """
        while self._n_ready < len(out) and (document := next(self._documents, None)) is not None:
            self._ready.append(document)
            self._n_ready += len(document.ids)
        n, offset = 0, self.cursor.token
        for document in self._ready:
            ids = document.ids[offset : offset + len(out) - n]
            out[n : n + len(ids)] = ids
            n, offset = n + len(ids), 0
            if n == len(out):
                break
        if n < 2:  # nothing, or the last token of all, which has been a target
            n = 0
        self._advance(len(out) - 1)
        return n

    def _advance(self, n: int) -> None:
        place = self.cursor.token + n
        while self._ready and place >= len(self._ready[0].ids):
            place -= len(self._ready.popleft().ids)
        if self._ready:
            self._n_ready -= n
            self.cursor = self._ready[0].cursor._replace(token=place)
        else:
            self._n_ready, self.cursor = 0, Cursor(epoch=1)

    def _encode(self) -> Iterator[_Encoded]:
        """All documents from the cursor on, encoded some at a time."""
        batch: list[tuple[Cursor, TextRecord]] = []
        characters, enough = 0, FIRST_ENCODE_CHARACTERS
        began_whole, is_empty = self.cursor[1:3] == (0, 0), True
        for place, record in self._records():
            if record is not None:
                batch.append((place, record))
                characters += len(record.text)
                if characters < enough:
                    continue
                enough = min(2 * enough, self._text.encode_characters)
            for document in self._encoded(batch):
                is_empty = False
                yield document
            batch, characters = [], 0
            if record is None:  # the end of an epoch
                if is_empty and began_whole and self._text.repeat:
                    raise ValueError(
                        f"data.lanes: lane {self._number} finds no document of its own in {self._where()}: it is "
                        "empty, or has fewer documents than lanes share it; leave it out, set data.repeat=false, or "
                        "prepare a text as small as this (data=local)"
                    )
                began_whole = is_empty = True

    def _where(self) -> str:
        pieces = self._text.order.pieces(self._number, 0)
        return ", ".join(self._text.name_of(piece.file) for piece in pieces[:3]) or "any file"

    def _encoded(self, batch: list[tuple[Cursor, TextRecord]]) -> Iterator[_Encoded]:
        try:
            found = self._encoder.encode([record for _, record in batch]) if batch else []
        except EncoderMismatch as error:
            raise ValueError(f"data.encoder: {error}; use data.encoder=tokenizers") from error
        for (place, record), ids in zip(batch, found, strict=True):
            if len(ids):
                yield _Encoded(place, np.concatenate([ids, self._eos.astype(ids.dtype)]))
            else:
                name = self._file(place)
                self._bad.n_good[name] -= 1
                self._bad.reject(name, name, BadDocument(record.number, "no tokens", "the tokenizer drops it all"))

    def _file(self, place: Cursor) -> str:
        return self._text.name_of(self._text.order.pieces(self._number, place.epoch)[place.piece].file)

    def _records(self) -> Iterator[tuple[Cursor, TextRecord | None]]:
        """Usable documents in the order of reading, and None at the end of each epoch."""
        epoch, first_piece, document, _ = self.cursor
        while self._text.repeat or epoch == 0:
            for number, piece in enumerate(self._text.order.pieces(self._number, epoch)):
                if number < first_piece:
                    continue
                for place, record in self._of_piece(piece, epoch, document):
                    yield Cursor(epoch, number, place), record
                document = 0
            first_piece = 0
            epoch += 1
            yield Cursor(epoch), None

    def _of_piece(self, piece: Piece, epoch: int, document: int) -> Iterator[tuple[int, TextRecord]]:
        """Documents of a piece from one on, each with its place in the order of reading."""
        order, name = self._text.order, self._text.name_of(piece.file)
        block = document // order.block
        # What was left out before a restart is not known any more: a share of the rest alone would say nothing.
        bad = self._bad if document == 0 else self._bad_of_rest
        records = bad.usable(name, name, self._text.reads.read(piece, epoch, block * order.block))
        held: dict[int, TextRecord] = {}  # of the block that is being read, by their number in the piece
        for record in records:
            ordinal = (record.number - 1 - piece.residue) // piece.stride
            while ordinal >= (block + 1) * order.block:
                yield from self._of_block(piece, epoch, block, held, document)
                held, block = {}, block + 1
            held[ordinal] = record
        yield from self._of_block(piece, epoch, block, held, document)
        if document == 0:
            bad.check_share(name)

    def _of_block(
        self, piece: Piece, epoch: int, block: int, held: dict[int, TextRecord], document: int
    ) -> Iterator[tuple[int, TextRecord]]:
        if not held:
            return
        order = self._text.order
        for place, ordinal in enumerate(order.documents(piece, epoch, block), start=block * order.block):
            if place >= document and ordinal in held:
                yield place, held[ordinal]
