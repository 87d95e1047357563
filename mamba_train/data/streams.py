"""Batches from texts that are tokenised while they are read: lanes, mixed by source, and their state.

Sample p of the run is drawn from the source that the mixture says (as for shards) and there from lane p modulo
`n_lanes`: the next window of that lane. So row j of the global batch always reads the same lanes, and which process
reads them makes no difference to the tokens (contract C3). Where each lane is, is the state.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba_train.config_data import BadDocuments, DataConfig, EncoderKind
from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.batches import EVERYTHING, BatchSource, WindowForm
from mamba_train.data.documents import Log
from mamba_train.data.encoders import Encoder, fastokens_call, make_encoder
from mamba_train.data.hub_text import HubText, read_hub
from mamba_train.data.lane_reader import LaneText
from mamba_train.data.lanes import STREAM_ORDER, Cursor, LaneOrder
from mamba_train.data.mixture import Mixture, Stage
from mamba_train.data.remote_files import HttpFile, Patience, is_address
from mamba_train.data.shared_reads import SharedReads
from mamba_train.data.stored_files import StoredFile
from mamba_train.data.text_files import BadDocument, Fields, Part, TextRecord, read_texts
from mamba_train.data.tokenizer import TextTokenizer

# Encoded at once for one lane: never so much that the other lanes of the process have to wait long (10 ms).
ENCODE_CHARACTERS = {EncoderKind.tokenizers: 1 << 14, EncoderKind.fastokens: 1 << 17}


@dataclass(frozen=True)
class StreamFile:
    """One file, or one part of a dataset of the hub; `place` is its path or address, `size` its stored bytes.

    modified: when it was last written, in seconds since 1970; 0 where nobody says.
    """

    name: str
    size: int
    place: str
    hub: HubText | None = None
    modified: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON values for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "StreamFile":
        """What `to_json` was made of."""
        return cls(**{**record, "hub": record["hub"] and HubText(**record["hub"])})

    def identity(self) -> list[Any]:
        """What says that a file is the one that it was, without reading it."""
        return [self.name, self.size, *([self.hub.config, self.hub.revision] if self.hub is not None else [])]

    def read(self, fields: Fields, part: Part, patience: Patience) -> Iterator[TextRecord | BadDocument]:
        """The documents of a part of it. Raises ValueError that begins with its place."""
        if self.hub is not None:
            return read_hub(self.hub, fields, part, patience)
        file: StoredFile = HttpFile(self.place, self.size, patience) if is_address(self.place) else Path(self.place)
        return read_texts(file, fields, part=part)


class StreamSource:
    """The samples of a run that streams; what `BatchSource` is for shards.

    cursors: int64 (sources, lanes, 4), where each lane is when `position` samples have been read; this process
    knows it of the lanes that it reads itself (see `gather`).
    """

    order = STREAM_ORDER
    may_change = False  # a cursor means nothing in other files

    def __init__(
        self, files: Mapping[str, Sequence[StreamFile]], tokenizer: bytes, data: DataConfig, global_batch_size: int,
        seed: int, form: WindowForm, stages: Sequence[tuple[int, Mapping[str, float]]] = EVERYTHING,
    ) -> None:  # fmt: skip
        """files: of each source by the names that stages use; tokenizer: a tokenizer.json.

        Raises ValueError (`data.lanes`) when rows of the global batch would not have lanes of their own.
        """
        self.n_lanes = data.lanes or global_batch_size
        if self.n_lanes % global_batch_size:
            raise ValueError(
                f"data.lanes={self.n_lanes}: expected a multiple of training.global_batch_size ({global_batch_size})"
            )
        self.files = {name: list(listed) for name, listed in files.items()}
        self.tokenizer, self.data, self.form = tokenizer, data, form
        self.global_batch_size, self.seed = global_batch_size, seed
        self.changes: list[dict[str, object]] = []  # as in BatchSource; there are none in streams
        self.rewritten: list[str] = []  # files of the same size as before, written since the checkpoint's first start
        self.position = 0
        self.set_stages([Stage(step, step * global_batch_size, weights) for step, weights in stages])

    def set_stages(self, stages: Sequence[Stage]) -> None:
        """Feed by these stages, from the beginning or, with a state that is loaded then, from there."""
        self.mixture = Mixture(stages, self.seed)
        self.names = self.mixture.names
        self.cursors = np.zeros((len(self.names), self.n_lanes, len(Cursor._fields)), dtype=np.int64)

    def fingerprint_of(self, name: str) -> str:
        """SHA-256 of what the places of a source depend on besides the seed: files, fields, tokenizer, settings.

        Places count all documents, those that are left out, too: a run that a bad one has stopped may go on without it.
        """
        return self._fingerprint(name, BadDocuments.error)

    def is_same(self, name: str, fingerprint: str) -> bool:
        """As `BatchSource.is_same`; the policy for bad documents was part of the fingerprints of older checkpoints."""
        return any(self._fingerprint(name, policy).startswith(fingerprint) for policy in BadDocuments)

    def _fingerprint(self, name: str, policy: BadDocuments) -> str:
        data, files = self.data, [file.identity() for file in self.files[name]]
        settings = [data.text_key, data.repeat, data.shuffle_files, data.shuffle_documents, str(policy)]
        content = json.dumps([hashlib.sha256(self.tokenizer).hexdigest(), files, settings])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def lane_order(self, name: str) -> LaneOrder:
        """Which documents the lanes of a source read."""
        data = self.data
        return LaneOrder(
            self.seed, name, len(self.files[name]), self.n_lanes, data.shuffle_files, max(1, data.shuffle_documents)
        )

    def gather(self, rank: int, world_size: int, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Learn from the other ranks where their lanes are; total: sums a tensor over all ranks."""
        mine = self._lanes_of(rank, world_size)
        self.cursors = total(torch.from_numpy(self.cursors * mine[None, :, None])).numpy()

    def _lanes_of(self, rank: int, world_size: int) -> np.ndarray:
        """Which lanes a rank reads, bool (lanes)."""
        # Rows begin at another lane than 0 where the batch had another size before.
        rows = (np.arange(self.n_lanes) - self.position) % self.global_batch_size
        return np.asarray(rows * world_size // self.global_batch_size == rank)

    def pieces_read(self, rank: int, world_size: int) -> list[int]:
        """How many files, or parts of files, the lanes of a rank have read to the end, all together; of each source."""
        epochs, pieces = self.cursors[:, self._lanes_of(rank, world_size), :2].sum(axis=1).T.tolist()
        return [
            epoch * self.lane_order(name).n_pieces + piece
            for name, epoch, piece in zip(self.names, epochs, pieces, strict=True)
        ]

    def epochs_of(self, pieces_read: Sequence[int]) -> dict[str, float]:
        """How often each source was read, in files that were read to the end; pieces_read: of all ranks."""
        return {
            name: read / (self.n_lanes * max(1, self.lane_order(name).n_pieces))
            for name, read in zip(self.names, pieces_read, strict=True)
        }

    def documents_read(self, samples: np.ndarray, before: np.ndarray) -> dict[str, list[list[int | None]]]:
        """By file, the lines of the first and last document of each of these samples' windows, in the order of reading.

        before: what `cursors` were before. null: from the beginning of what the lane has of a file, or to its end.
        """
        found: dict[str, list[list[int | None]]] = {}
        numbers = self.mixture.locate(samples)[0]
        for number, lane in zip(numbers.tolist(), (samples % self.n_lanes).tolist(), strict=True):
            name = self.names[number]
            order, files = self.lane_order(name), self.files[name]
            first, last = Cursor(*before[number, lane].tolist()), self.cursor(number, lane)
            if first == last:  # the lane had ended
                continue
            # At its beginning a lane does not know yet which documents there are.
            begins = None if first == Cursor() else order.line(lane, first)
            ends = None if self._has_ended(last) else order.line(lane, last)
            if first[:2] == last[:2]:
                spans: list[tuple[Cursor, list[int | None]]] = [(first, [begins, ends])]
            else:
                spans = [(first, [begins, None]), *([(last, [None, ends])] if ends is not None else [])]
            for cursor, span in spans:
                file = files[order.pieces(lane, cursor.epoch)[cursor.piece].file]
                # Files of two sources may have one name.
                found.setdefault(file.place if file.hub is None else file.name, []).append(span)
        return found

    def own_state(self) -> dict[str, Any]:
        """Where the lanes are, for the checkpoint, in JSON values that a person can read."""
        return {
            "newest_file": max((file.modified for listed in self.files.values() for file in listed), default=0.0),
            "lanes": {
                name: [self._described(name, lane, Cursor(*cursor)) for lane, cursor in enumerate(cursors.tolist())]
                for name, cursors in zip(self.names, self.cursors, strict=True)
            },
        }

    def _described(self, name: str, lane: int, cursor: Cursor) -> dict[str, Any]:
        pieces = self.lane_order(name).pieces(lane, cursor.epoch)
        file = self.files[name][pieces[cursor.piece].file].name if pieces and not self._has_ended(cursor) else None
        return {"file": file, **cursor._asdict()}

    def _has_ended(self, cursor: Cursor) -> bool:
        return cursor.epoch > 0 and not self.data.repeat

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `own_state` gave. Raises ValueError (`data.lanes`) for another number of lanes."""
        for number, name in enumerate(self.names):
            saved = state["lanes"].get(name)
            if saved is None:  # a source of a stage to come
                continue
            if len(saved) != self.n_lanes:
                raise ValueError(
                    f"data.lanes={self.n_lanes}: the checkpoint was trained with {len(saved)}; "
                    f"set data.lanes={len(saved)}, or start a new run with another run_dir"
                )
            self.cursors[number] = [[lane[field] for field in Cursor._fields] for lane in saved]
        self.position = state["samples"]
        known = [file for name in state["lanes"] if name in self.files for file in self.files[name]]
        self.rewritten = [file.place for file in known if file.modified > state["newest_file"]]

    def cursor(self, number: int, lane: int) -> Cursor:
        """Where a lane of the source `names[number]` is."""
        return Cursor(*self.cursors[number, lane].tolist())

    def open_text(self, number: int, lanes: Sequence[int], log: Log) -> LaneText:
        """What some lanes of the source `names[number]` read, from where they are."""
        data, name = self.data, self.names[number]
        files, fields = self.files[name], Fields(data.text_key)
        patience = Patience(data.network_retries, data.network_timeout_seconds)
        order = self.lane_order(name)
        reads = SharedReads(
            order,
            {lane: self.cursor(number, lane) for lane in lanes},
            lambda file, part: files[file].read(fields, part, patience),
        )
        policy = BadDocuments(data.bad_documents)
        return LaneText(
            order, reads, lambda file: files[file].place, lambda: BadDocumentFilter(policy, data.max_bad_share, log),
            ENCODE_CHARACTERS[EncoderKind(data.encoder)],
            data.repeat,
        )  # fmt: skip

    def epochs(self, samples: int) -> dict[str, float]:
        """Nothing: a number of samples does not say; see `epochs_of`."""
        return {}

    def bytes_per_target(self, sample: int) -> float:
        """Not known before the text is read: the loader counts."""
        return 1.0


Source = BatchSource | StreamSource  # what a run reads its samples from


def encoder_of(tokenizer: TextTokenizer, kind: EncoderKind) -> Encoder:
    """What turns text into ids in one process."""
    return make_encoder(tokenizer, fastokens_call(tokenizer) if kind is EncoderKind.fastokens else None)
