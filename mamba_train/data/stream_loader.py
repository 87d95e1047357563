"""Batches of one rank of a stream: each process tokenises the lanes of its own rows, and nothing else."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from mamba_train.data.batches import Batch, document_numbers
from mamba_train.data.corpus import ReadError
from mamba_train.data.encoders import Encoder
from mamba_train.data.lane_reader import Lane, LaneText
from mamba_train.data.lanes import Cursor
from mamba_train.data.loader import BatchLoader
from mamba_train.data.remote_files import REQUESTS
from mamba_train.data.streams import Source, StreamSource, encoder_of
from mamba_train.data.tokenizer import TextTokenizer

OPENING_THREADS = 64  # many, as lanes that share a file wait for the one of them that reads


@dataclass(frozen=True)
class Rows:
    """Some rows of a global batch and where their lanes are behind them.

    lanes: int64 (rows, 2), source and lane of each row; cursors: int64 (rows, 4). counts: UTF-8 bytes of the
    targets; since the last item, documents that were left out, and requests to a server that were repeated.
    """

    batch: Batch
    lanes: np.ndarray
    cursors: np.ndarray
    counts: tuple[int, int, int]

    def pin_memory(self) -> "Rows":
        """For the DataLoader, which does it in a thread while the device computes."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass
class RankRows(Dataset):
    """Item i: part i modulo `n_parts` of this rank's rows of a global batch, the batches counted from `first_sample`.

    With `n_parts` worker processes, which take the items in turn, each has the same rows always. Items are asked for
    in their order. An error of reading is returned and not raised, as in `RankBatches`.
    """

    source: StreamSource
    first_sample: int
    rank: int
    world_size: int
    n_parts: int
    texts: list[LaneText] = field(default_factory=list)  # of the sources; all that follows is of this process
    lanes: dict[tuple[int, int], Lane] = field(default_factory=dict)
    encoder: Encoder | None = None
    tokenizer: TextTokenizer | None = None
    counted: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))

    def __getitem__(self, index: int) -> Rows | ReadError:
        step, part = divmod(index, self.n_parts)
        n_rows = self.source.global_batch_size // self.world_size
        rows = self.rank * n_rows + np.arange(part * n_rows // self.n_parts, (part + 1) * n_rows // self.n_parts)
        try:
            if not self.texts:
                self._begin(self.first_sample + rows)
            return self._read(self.first_sample + step * self.source.global_batch_size + rows)
        except ReadError as error:
            return error
        except ValueError as error:
            return ReadError(str(error))

    def _begin(self, samples: np.ndarray) -> None:
        """Prepare to read these samples, and those of the same rows of all later batches."""
        source = self.source
        if get_worker_info() is not None:  # the processes are what runs side by side
            os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
        self.tokenizer = TextTokenizer(source.tokenizer, "data.tokenizer")
        self.encoder = encoder_of(self.tokenizer, source.data.encoder)
        turns = np.arange(0, source.n_lanes, source.global_batch_size)
        lanes = ((samples[:, None] + turns) % source.n_lanes).ravel().tolist()
        self.texts = [source.open_text(number, lanes, _say) for number in range(len(source.names))]

    def _read(self, samples: np.ndarray) -> Rows:
        source, form = self.source, self.source.form
        assert self.tokenizer is not None
        eos_id = self.tokenizer.eos_id
        numbers = source.mixture.locate(samples)[0] if len(source.names) > 1 else np.zeros_like(samples)
        lanes = np.stack([numbers, samples % source.n_lanes], axis=1)
        tokens = np.full((len(samples), form.length + 1), eos_id, dtype=np.int64)
        cursors = np.empty((len(samples), len(Cursor._fields)), dtype=np.int64)
        lengths = np.empty(len(samples), dtype=np.int64)
        self._open([(number, lane) for number, lane in lanes.tolist() if (number, lane) not in self.lanes])
        for row, (number, lane) in enumerate(lanes.tolist()):
            reader = self.lanes[number, lane]
            lengths[row] = reader.window(tokens[row])
            cursors[row] = reader.cursor
        seq_idx = torch.from_numpy(document_numbers(tokens, eos_id)) if form.with_boundaries else None
        is_full = bool((lengths == form.length + 1).all())
        batch = Batch(
            torch.from_numpy(tokens),
            seq_idx,
            eos_id if form.mask_loss else None,
            lengths=None if is_full else torch.from_numpy(lengths),
        )
        targets = tokens[:, 1:]  # behind the end of a lane are ends of documents, which have no bytes
        n_bytes = self.tokenizer.n_bytes(targets)
        if form.mask_loss:
            n_bytes -= self.tokenizer.n_bytes(targets[tokens[:, :-1] == eos_id])
        return Rows(batch, lanes, cursors, (n_bytes, *self._count()))

    def _open(self, missing: list[tuple[int, int]]) -> None:
        """Open lanes, together those that go on: decompression leaves the other threads their turn."""
        source, going_on = self.source, []
        assert self.encoder is not None
        assert self.tokenizer is not None
        for number, lane in missing:
            cursor = source.cursor(number, lane)
            reader = Lane(lane, self.texts[number], cursor, self.encoder, self.tokenizer.eos_id)
            self.lanes[number, lane] = reader
            if cursor.document:
                going_on.append(reader)
        if going_on:
            with ThreadPoolExecutor(OPENING_THREADS) as pool:
                list(pool.map(Lane.begin, going_on))

    def _count(self) -> tuple[int, int]:
        """What went wrong since the last call."""
        now = np.array([sum(lane.n_left_out for lane in self.lanes.values()), REQUESTS.repeated])
        n_left_out, n_repeated = (now - self.counted).tolist()
        self.counted = now
        return n_left_out, n_repeated


def _say(text: str) -> None:
    # Of any rank, as each reads files that the others do not; in one piece, as lanes are opened by several threads.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class StreamLoader(BatchLoader):
    """Gives a rank its micro-batches of each global batch of a stream, and keeps the state of its lanes."""

    source: StreamSource

    def __init__(self, source: Source, *arguments: Any, **options: Any) -> None:
        super().__init__(source, *arguments, **options)
        assert isinstance(source, StreamSource)
        self.finite = not source.data.repeat
        self._workers = min(self._workers, self._n_rows)
        self._before = source.cursors

    @property
    def _n_rows(self) -> int:
        return self.source.global_batch_size // self._world_size

    def _step(self, first_sample: int) -> list[Batch]:
        """As `BatchLoader._step`; what lies between the position of the source and that sample is read and dropped."""
        if self._items is None or self.source.position != self._next_sample:
            self._start(self.source.position)  # also after another state was loaded
        if first_sample < self.source.position:
            raise ReadError(f"a stream cannot go back from sample {self.source.position} to {first_sample}")
        while self.source.position < first_sample:
            self._take()
        return self._micro_batches(self._take())

    def begin(self, first_sample: int) -> None:
        """As `BatchLoader.begin`."""
        super().begin(self.source.position)

    def gather(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Complete the state of the source by what the other ranks know."""
        self.source.gather(self._rank, self._world_size, total)

    def documents(self, total: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, list[list[int | None]]]:
        """What the last step has read on all ranks, see `StreamSource.documents_read`; all of them must call it."""
        after = self.source.cursors
        self.source.cursors = self._before
        self.gather(total)
        before, self.source.cursors = self.source.cursors, after
        self.gather(total)
        position = self.source.position
        return self.source.documents_read(np.arange(position - self.source.global_batch_size, position), before)

    def _dataset(self, first_sample: int) -> Dataset:
        self._next_sample = first_sample
        return RankRows(self.source, first_sample, self._rank, self._world_size, max(1, self._workers))

    def _take(self) -> list[Rows]:
        """This rank's rows of the next global batch."""
        self._before = self.source.cursors.copy()
        parts: list[Rows] = [self._next() for _ in range(max(1, self._workers))]
        for rows in parts:
            numbers, lanes = rows.lanes.T
            self.source.cursors[numbers, lanes] = rows.cursors
        counts = np.array([rows.counts for rows in parts]).sum(axis=0).tolist()
        self.source.position += self.source.global_batch_size
        self._next_sample = self.source.position
        self.counts = (*counts, *self.source.pieces_read(self._rank, self._world_size))
        return parts

    def _micro_batches(self, parts: Sequence[Rows]) -> list[Batch]:
        """The rows of the processes in micro-batches; where these are the same rows, nothing is copied."""
        found = []
        for first in range(0, self._n_rows, self._micro_batch_size):
            pieces, begin = [], 0
            for batch in (rows.batch for rows in parts):
                end = begin + len(batch.tokens)
                here = slice(max(first, begin) - begin, min(first + self._micro_batch_size, end) - begin)
                if here.start < here.stop:
                    pieces.append(_rows_of(batch, here))
                begin = end
            whole = _joined(pieces, self.source.form.length + 1)
            found.append(whole.pin_memory() if self._pin_memory and len(pieces) > 1 else whole)
        return found


def _rows_of(batch: Batch, rows: slice) -> Batch:
    seq_idx = None if batch.seq_idx is None else batch.seq_idx[rows]
    lengths = None if batch.lengths is None else batch.lengths[rows]
    return Batch(batch.tokens[rows], seq_idx, batch.unpredictable_after, lengths=lengths)


def _joined(parts: Sequence[Batch], length: int) -> Batch:
    if len(parts) == 1:
        return parts[0]
    lengths = None
    if any(part.lengths is not None for part in parts):
        lengths = torch.cat(
            [torch.full((len(part.tokens),), length) if part.lengths is None else part.lengths for part in parts]
        )
    seq_idx = [part.seq_idx for part in parts if part.seq_idx is not None]
    return Batch(
        torch.cat([part.tokens for part in parts]),
        torch.cat(seq_idx) if seq_idx else None,
        parts[0].unpredictable_after,
        lengths=lengths,
    )
