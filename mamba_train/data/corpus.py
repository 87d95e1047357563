"""One split of a prepared folder, seen as a single long array of tokens."""

from pathlib import Path
from typing import Self

import numpy as np

from mamba_train.data.documents import Split
from mamba_train.data.manifest import Manifest, read_manifest
from mamba_train.data.shards import ShardReader


class Corpus:
    """The tokens of a split: its shards one after another, in the order of the manifest."""

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        entries = manifest.shards[split]
        self.folder = folder
        self.split: Split = split
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.vocab_size
        self.eos_id = manifest.eos_id
        self.n_documents = manifest.total(split, "n_documents")
        self.n_tokens = manifest.total(split, "n_tokens")
        self.n_bytes = manifest.total(split, "n_bytes")
        self._shards = [ShardReader(folder / entry.name) for entry in entries]
        for entry, shard in zip(entries, self._shards, strict=True):
            found = len(shard.tokens)
            if found != entry.n_tokens:
                raise ValueError(f"{folder / entry.name}.bin: {found} tokens, the manifest says {entry.n_tokens}")
        self._ends = np.cumsum([entry.n_tokens for entry in entries], dtype=np.int64)

    @classmethod
    def open(cls, path: Path | str, split: Split) -> Self:
        """Open the folder that `prepare` returned. Raises ValueError if it is not complete."""
        return cls(Path(path), read_manifest(Path(path)), split)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens counted as tokens."""
        return self.n_bytes / max(1, self.n_tokens)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill the 1-D array `out` with the tokens from `start` on, across shards where needed."""
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(out):
            tokens = self._shards[shard].tokens
            offset = start + filled - (int(self._ends[shard]) - len(tokens))
            part = tokens[offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def tokens(self, limit: int | None = None) -> np.ndarray:
        """The first `limit` tokens (None: all), int32 (n,), in memory."""
        n = self.n_tokens if limit is None else min(limit, self.n_tokens)
        out = np.empty(n, dtype=np.int32)
        self.read(0, out)
        return out
