"""Token shards, possibly of several prepared folders, seen as a single long array of tokens.

Shards are read by offset and not through a memory map: a map turns a failing disk or a file cut short into a
signal that kills the process without saying where, and holds a file descriptor for each of thousands of shards.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from mamba_train.data.documents import Split
from mamba_train.data.manifest import Manifest, read_manifest
from mamba_train.data.shards import ShardReader

MAX_OPEN_FILES = 256  # per process; a limit of 1,024 is common


class ReadError(ValueError):
    """Tokens cannot be read from shards that were opened; the message is one line that names shard and offset."""


class _OpenFiles:
    """Descriptors of the files that were read last."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def get(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[path] = descriptor
        if len(self._descriptors) > MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def forget(self, path: str) -> None:
        """Another file may have this name by now."""
        if path in self._descriptors:
            os.close(self._descriptors.pop(path))


_OPEN_FILES = _OpenFiles()  # of this process: a corpus is sent to loader processes without them


@dataclass(frozen=True)
class _Shard:
    path: str  # of the .bin
    dtype: np.dtype
    n_tokens: int

    def read(self, offset: int, n: int, vocab_size: int) -> np.ndarray:
        """Tokens from `offset` on, (n,) of the stored type. Raises ReadError."""
        size = self.dtype.itemsize
        try:
            content = os.pread(_OPEN_FILES.get(self.path), n * size, offset * size)
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read at token {offset:,}: {error.strerror}") from error
        if len(content) < n * size:
            raise ReadError(
                f"{self.path}: token {offset + len(content) // size:,} of {self.n_tokens:,} is not there; "
                "it was cut short after the run began"
            )
        tokens = np.frombuffer(content, dtype=self.dtype)
        wrong = tokens >= vocab_size
        if self.dtype.kind == "i":
            wrong |= tokens < 0
        if wrong.any():
            first = int(wrong.argmax())
            raise ReadError(
                f"{self.path}: token {tokens[first]} at offset {offset + first:,}, the vocabulary has {vocab_size:,}; "
                "the file is damaged (data.check_hashes=true finds out at the start)"
            )
        return tokens


class Corpus:
    """The tokens of one split: its shards one after another, in the order of the manifests.

    Attributes: `n_tokens`, `n_documents`, `n_bytes` (UTF-8) of the text; `vocab_size`, `eos_id`; `folder`, the first
    one; `fingerprint`, SHA-256 of tokens, order and tokenizer.
    """

    def __init__(
        self, folders: Sequence[tuple[Path, Manifest]], split: Split, labels: Iterable[str] | None = None
    ) -> None:
        """labels: of the shards that belong to it (None: all). The manifests have one tokenizer.

        Raises ValueError naming a shard that is not what its manifest says.
        """
        wanted = None if labels is None else set(labels)
        entries = [
            (folder, entry)
            for folder, manifest in folders
            for entry in manifest.shards[split]
            if wanted is None or entry.label in wanted
        ]
        self.folder, manifest = folders[0]
        self.split: Split = split
        self.vocab_size = manifest.vocab_size
        self.eos_id = manifest.eos_id
        self.n_documents = sum(entry.n_documents for _, entry in entries)
        self.n_tokens = sum(entry.n_tokens for _, entry in entries)
        self.n_bytes = sum(entry.n_bytes for _, entry in entries)
        self.shard_hashes = {entry.bin_sha256 for _, entry in entries if entry.n_tokens}
        tokens = [[entry.n_tokens, entry.bin_sha256] for _, entry in entries]
        content = json.dumps([manifest.tokenizer_sha256, manifest.eos_id, tokens])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self._shards = [_open(folder / entry.name, entry.n_tokens) for folder, entry in entries]
        self._ends = np.cumsum([shard.n_tokens for shard in self._shards], dtype=np.int64)

    @classmethod
    def open(cls, path: Path | str, split: Split) -> Self:
        """Open a split of the folder that `prepare` returned. Raises ValueError if it is not complete."""
        return cls([(Path(path), read_manifest(Path(path)))], split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens counted as tokens."""
        return self.n_bytes / max(1, self.n_tokens)

    def place(self, start: int) -> tuple[str, int]:
        """Where a token lies: the `.bin` file and the offset in it, counted in tokens."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        return self._shards[shard].path, start - int(self._ends[shard]) + self._shards[shard].n_tokens

    def documents(self, start: int, n: int) -> list[tuple[str, int, int]]:
        """(shard, first document, last document) of the tokens from `start` on, documents counted in their shard."""
        found = []
        end = min(start + n, self.n_tokens)
        while start < end:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            path, offset = self.place(start)
            until = min(end, int(self._ends[shard]))
            index = ShardReader(Path(path).with_suffix(""))
            places = np.array([offset, offset + until - start - 1]) * index.tokens.itemsize
            first, last = (np.searchsorted(index.pointers, places, side="right") - 1).tolist()
            found.append((path, first, last))
            start = until
        return found

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill the 1-D array `out` with the tokens from `start` on, across shards where needed. Raises ReadError."""
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(out):
            shard = self._shards[number]
            offset = start + filled - (int(self._ends[number]) - shard.n_tokens)
            n = min(shard.n_tokens - offset, len(out) - filled)
            if n:  # an empty shard has no token to begin with
                out[filled : filled + n] = shard.read(offset, n, self.vocab_size)
            filled += n
            number += 1

    def tokens(self, limit: int | None = None) -> np.ndarray:
        """The first `limit` tokens (None: all), int32 (n,), in memory."""
        n = self.n_tokens if limit is None else min(limit, self.n_tokens)
        out = np.empty(n, dtype=np.int32)
        self.read(0, out)
        return out


def _open(prefix: Path, n_tokens: int) -> _Shard:
    reader = ShardReader(prefix)  # raises for an index or a size that is wrong
    if len(reader.tokens) != n_tokens:
        raise ValueError(f"{prefix}.bin: {len(reader.tokens)} tokens, the manifest says {n_tokens}")
    _OPEN_FILES.forget(f"{prefix}.bin")
    return _Shard(f"{prefix}.bin", reader.tokens.dtype, n_tokens)
