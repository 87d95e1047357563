"""Token shards in Megatron's indexed format (MMIDIDX, version 1): writer and memory-mapped reader.

`NAME.bin` holds the token ids of all documents one after another. `NAME.idx` holds, little-endian:
9 bytes of magic, u64 version, u8 code of the token type, u64 number of sequences, u64 number of
entries of the document index, i32 lengths in tokens, i64 offsets in bytes, i64 document index. Each
document is one sequence here and ends with the end-of-document token. Megatron-LM, NeMo, gpt-neox and
datatrove read and write the same files.
"""

import dataclasses
import hashlib
import os
import struct
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mamba_train.data.manifest import ShardEntry

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MAX_UINT16_VOCAB_SIZE = 65_500  # the limit that Megatron itself uses
MAX_DOCUMENT_TOKENS = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest token type that Megatron would choose for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= MAX_UINT16_VOCAB_SIZE else np.int32)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is not, before this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The contents of an `.idx` file for documents of these lengths (tokens) stored as `dtype`."""
    n = len(lengths)
    # 64 bits before multiplying: a shard may well be larger than 2^31 bytes.
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, np.int64), ends])[:n]
    code = next(code for code, known in DTYPES.items() if dtype == known)
    return b"".join(
        [
            MAGIC,
            HEADER.pack(VERSION, code, n, n + 1),
            lengths.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.arange(n + 1, dtype="<i8").tobytes(),
        ]
    )


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whose contents are on the disk when this returns."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Give a file other contents at once: whoever reads it, also after a crash, sees the old ones or the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


class ShardWriter:
    """Write one shard; nothing has its final name before `close`, and leaving on an error removes it.

    Memory: 4 bytes per document. The bytes written depend on the documents alone.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, eos_id: int) -> None:
        self._prefix = prefix
        self._dtype = dtype.newbyteorder("<")
        self._eos = np.array([eos_id], dtype=self._dtype)
        self._lengths = array("i")
        self._sha256 = hashlib.sha256()
        self._n_text_bytes = 0
        self.size_bytes = 0
        self._bin = self._temporary(".bin").open("wb")

    def _temporary(self, suffix: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}{suffix}.tmp")

    def add(self, ids: np.ndarray, n_text_bytes: int) -> None:
        """Append one document, `ids` without its end-of-document token."""
        if len(ids) + 1 > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"a document of {len(ids)} tokens is too long; the format allows 2^31 - 2")
        for part in (np.ascontiguousarray(ids, dtype=self._dtype), self._eos):
            data = part.data  # no copy: a document may be large
            self._bin.write(data)
            self._sha256.update(data)
            self.size_bytes += data.nbytes
        self._lengths.append(len(ids) + 1)
        self._n_text_bytes += n_text_bytes

    def close(self) -> ShardEntry:
        """Finish both files (fsync, then rename) and return the shard's entry for the manifest."""
        index = index_bytes(np.frombuffer(self._lengths, dtype=np.int32), self._dtype)
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        write_durably(self._temporary(".idx"), index)
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), self._prefix.with_name(self._prefix.name + suffix))
        fsync_folder(self._prefix.parent)
        return ShardEntry(
            name=self._prefix.name,
            n_documents=len(self._lengths),
            n_tokens=self.size_bytes // self._dtype.itemsize,
            n_bytes=self._n_text_bytes,
            bin_size=self.size_bytes,
            idx_size=len(index),
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for suffix in (".bin", ".idx"):
            self._temporary(suffix).unlink(missing_ok=True)


class ShardSeries:
    """Write documents to one shard after another; a new one begins when the last has reached its size.

    A document longer than a shard is written whole, alone. `name_of` gives the name of the n-th shard,
    relative to `folder`. `entries` are those of the finished shards.
    """

    def __init__(
        self, folder: Path, name_of: Callable[[int], str], dtype: np.dtype, eos_id: int, max_bytes: int
    ) -> None:
        self._folder, self._name_of, self._dtype, self._eos_id = folder, name_of, dtype, eos_id
        self._max_bytes = max_bytes
        self._writer: ShardWriter | None = None
        self.entries: list[ShardEntry] = []

    def add(self, ids: np.ndarray, n_text_bytes: int) -> None:
        """Append one document, `ids` without its end-of-document token."""
        size = (len(ids) + 1) * self._dtype.itemsize
        if self._writer is not None and self._writer.size_bytes + size > self._max_bytes:
            self.close()
        if self._writer is None:
            prefix = self._folder / self._name_of(len(self.entries))
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._writer = ShardWriter(prefix, self._dtype, self._eos_id)
        self._writer.add(ids, n_text_bytes)

    def close(self) -> None:
        """Finish the last shard."""
        if self._writer is not None:
            with self._writer as writer:
                name = self._name_of(len(self.entries))
                self.entries.append(dataclasses.replace(writer.close(), name=name))
            self._writer = None


class ShardReader:
    """Read one shard by memory mapping.

    Attributes: `tokens` (n_tokens,) of the stored type; `lengths` (n_sequences,) int32;
    `pointers` (n_sequences,) int64, in bytes; `document_index` int64. Raises ValueError with the file
    and what is wrong with it.
    """

    def __init__(self, prefix: Path) -> None:
        idx_path = prefix.with_name(prefix.name + ".idx")
        bin_path = prefix.with_name(prefix.name + ".bin")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise ValueError(f"{path}: this file of a token shard is missing")
        start = len(MAGIC) + HEADER.size
        with idx_path.open("rb") as stream:
            header = stream.read(start)
        if len(header) < start or not header.startswith(MAGIC):
            raise ValueError(f"{idx_path}: not a Megatron index (MMIDIDX)")
        version, code, n_sequences, n_index = HEADER.unpack_from(header, len(MAGIC))
        if version != VERSION or code not in DTYPES:
            raise ValueError(f"{idx_path}: version {version}, token type {code}; can read version {VERSION}")
        expected = start + 12 * n_sequences + 8 * n_index
        if idx_path.stat().st_size != expected:
            raise ValueError(f"{idx_path}: {idx_path.stat().st_size} bytes, expected {expected}: truncated?")
        index = np.memmap(idx_path, dtype=np.uint8, mode="r")
        middle = start + 4 * n_sequences
        end = middle + 8 * n_sequences
        self.lengths: np.ndarray = index[start:middle].view("<i4")
        self.pointers: np.ndarray = index[middle:end].view("<i8")
        self.document_index: np.ndarray = index[end:].view("<i8")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        size = int(self.pointers[-1]) + int(self.lengths[-1]) * dtype.itemsize if n_sequences else 0
        if bin_path.stat().st_size != size:
            raise ValueError(f"{bin_path}: {bin_path.stat().st_size} bytes, expected {size}: truncated?")
        # An empty file cannot be mapped.
        self.tokens: np.ndarray = np.memmap(bin_path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)

    def __len__(self) -> int:
        """The number of sequences (documents)."""
        return len(self.lengths)

    def document(self, number: int) -> np.ndarray:
        """Token ids of one sequence, its end-of-document token included."""
        start = int(self.pointers[number]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.lengths[number])]
