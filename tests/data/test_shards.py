import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data.manifest import ShardEntry
from mamba_train.data.shards import ShardReader, ShardSeries, ShardWriter, index_bytes, token_dtype

UINT16 = np.dtype(np.uint16)


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = UINT16, eos_id: int = 0) -> ShardEntry:
    with ShardWriter(prefix, dtype, eos_id) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), len(document))
        return writer.close()


@given(st.lists(st.lists(st.integers(1, 65_499), max_size=20), max_size=10))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "train-00000"
    entry = write(prefix, documents)
    shard = ShardReader(prefix)
    assert [shard.document(i).tolist() for i in range(len(shard))] == [[*document, 0] for document in documents]
    assert shard.tokens.tolist() == [token for document in documents for token in [*document, 0]]
    assert shard.document_index.tolist() == list(range(len(documents) + 1))
    assert (entry.n_documents, entry.n_tokens) == (len(documents), len(shard.tokens))
    for suffix, size, sha256 in [
        (".bin", entry.bin_size, entry.bin_sha256),
        (".idx", entry.idx_size, entry.idx_sha256),
    ]:
        data = prefix.with_name(prefix.name + suffix).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


def test_the_bytes_are_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "x", [[7, 8], [9]], eos_id=3)
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5H", 7, 8, 3, 9, 3)
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path) -> None:
    assert token_dtype(65_500) == np.uint16
    assert token_dtype(65_501) == np.int32
    write(tmp_path / "x", [[100_000]], token_dtype(100_001))
    assert ShardReader(tmp_path / "x").tokens.tolist() == [100_000, 0]
    assert (tmp_path / "x.idx").read_bytes()[17] == 4


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    lengths = np.array([2**31 - 1, 2**31 - 1, 3], dtype=np.int32)
    (tmp_path / "x.idx").write_bytes(index_bytes(lengths, UINT16))
    with (tmp_path / "x.bin").open("wb") as stream:  # sparse: takes no space on the disk
        os.truncate(stream.fileno(), int(lengths.sum(dtype=np.int64)) * 2)
        stream.seek(-6, os.SEEK_END)
        stream.write(struct.pack("<3H", 4, 5, 6))
    shard = ShardReader(tmp_path / "x")
    assert int(shard.pointers[2]) == (2**32 - 2) * 2
    assert shard.document(2).tolist() == [4, 5, 6]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "x", UINT16, 0) as writer:
            writer.add(np.array([1, 2]), 2)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x.bin", lambda data: data[:-1], r"x\.bin: 9 bytes, expected 10"),
        ("x.idx", lambda data: data[:-1], r"x\.idx: .* truncated"),
        ("x.idx", lambda data: data[:10], "not a Megatron index"),
        ("x.idx", lambda data: b"PK" + data[2:], "not a Megatron index"),
        ("x.idx", lambda data: data[:9] + b"\2" + data[10:], "version 2"),
        ("x.idx", None, r"x\.idx: this file of a token shard is missing"),
        ("x.bin", None, r"x\.bin: this file of a token shard is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, message: str) -> None:
    write(tmp_path / "x", [[1, 2], [3]])
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ShardReader(tmp_path / "x")


def test_a_shard_that_megatron_wrote(materials: Path) -> None:
    prefix = materials / "megatron_gpt2" / "meg-gpt2-openwebtext_text_document"
    shard = ShardReader(prefix)
    assert shard.tokens.dtype == np.uint16
    assert (len(shard), len(shard.tokens)) == (1_000, 1_361_845)
    assert np.count_nonzero(shard.tokens == 4999) == 1_000
    assert all(shard.document(i)[-1] == 4999 for i in range(len(shard)))


def test_our_writer_gives_megatrons_bytes(materials: Path, tmp_path: Path) -> None:
    prefix = materials / "megatron_gpt2" / "meg-gpt2-openwebtext_text_document"
    shard = ShardReader(prefix)
    write(tmp_path / "x", [shard.document(i)[:-1].tolist() for i in range(len(shard))], eos_id=4999)
    for suffix in (".bin", ".idx"):
        theirs = prefix.with_name(prefix.name + suffix).read_bytes()
        assert (tmp_path / f"x{suffix}").read_bytes() == theirs


def test_a_series_fills_its_shards_to_the_brim(tmp_path: Path) -> None:
    series = ShardSeries(tmp_path, lambda n: f"{n}", np.dtype(np.uint16), 0, max_bytes=20)
    for length in (4, 4, 4, 5, 30, 1):
        series.add(np.ones(length, dtype=np.uint16), 1)
    series.close()
    assert [entry.n_documents for entry in series.entries] == [2, 1, 1, 1, 1]
    assert [entry.bin_size for entry in series.entries] == [20, 10, 12, 62, 4]
