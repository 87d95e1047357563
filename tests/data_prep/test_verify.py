import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mamba_train.data.manifest import MANIFEST_NAME, ShardEntry, file_sha256, read_manifest
from mamba_train.data.shard_job import JOB_NAME
from mamba_train.data.shards import ShardWriter, index_bytes
from mamba_train.data.verification import folder_problems, plan_problems, shard_problems
from tests.data_prep.helpers import Row, command, make_shards

NAME = "train/ArXiv/00001-000"


@pytest.fixture
def shards(tmp_path: Path, pile: Callable[..., dict[str, list[Row]]], tokenizer_file: Path) -> Path:
    pile(3)
    make_shards([f"{tmp_path}/raw/train"], tmp_path / "out", tokenizer_file)
    return tmp_path / "out"


def problems(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    found = list(folder_problems(folder, manifest))
    for entry in manifest.shards["train"]:
        found += shard_problems(folder, manifest, entry)
    return found


def accept(folder: Path) -> None:
    """Write the sizes and hashes of the changed shard into the manifest: only its contents can tell now."""
    record = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in record["shards"]["train"]:
        for kind in ("bin", "idx"):
            path = folder / f"{entry['name']}.{kind}"
            entry[f"{kind}_sha256"], entry[f"{kind}_size"] = file_sha256(path), path.stat().st_size
    (folder / MANIFEST_NAME).write_text(json.dumps(record))


def entry_of(folder: Path) -> ShardEntry:
    return next(entry for entry in read_manifest(folder).shards["train"] if entry.name == NAME)


def test_nothing_is_wrong(shards: Path) -> None:
    assert problems(shards) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("place", [0, -1, 100])
def test_a_flipped_byte(shards: Path, suffix: str, place: int) -> None:
    path = shards / (NAME + suffix)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))
    assert problems(shards)[0] == f"{path}: SHA-256 is not the manifest's: a byte was changed"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_or_missing_shard(shards: Path, suffix: str) -> None:
    path = shards / (NAME + suffix)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    assert problems(shards) == [f"{path}: {size - 2} bytes, the manifest says {size}"]
    path.unlink()
    assert problems(shards) == [f"{path}: is missing"]


def change_token(folder: Path, place: int, token: int) -> None:
    path = folder / f"{NAME}.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[place] = token
    tokens.tofile(path)
    accept(folder)


def test_an_id_outside_the_vocabulary(shards: Path) -> None:
    size = read_manifest(shards).vocab_size
    change_token(shards, 3, size)
    assert problems(shards) == [f"{shards}/{NAME}.bin: token 3 (offset 6) is {size}, the vocabulary has {size}"]


def test_an_end_of_document_that_is_none(shards: Path) -> None:
    change_token(shards, 3, 0)
    (problem,) = problems(shards)
    assert "token 3 (offset 6) is the end-of-document id, but no document ends there" in problem


def test_a_missing_end_of_document(shards: Path) -> None:
    change_token(shards, -1, 5)
    (problem,) = problems(shards)
    n = entry_of(shards).n_documents
    assert f"{n} documents, but only {n - 1} end with the end-of-document id" in problem


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 24])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_doubled_end_of_document(shards: Path, empty: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_train.data.verification.CHECKED_TOKENS", chunk)
    documents = [[5, 6], [7], [8, 9]]
    documents.insert(empty, [])
    with ShardWriter(shards / NAME, np.dtype(np.uint16), 0) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), 1)
        entry = writer.close()
    record = json.loads((shards / MANIFEST_NAME).read_text())
    listed = next(e for e in record["shards"]["train"] if e["name"] == NAME)
    listed.update(n_documents=entry.n_documents, n_tokens=entry.n_tokens)
    (shards / MANIFEST_NAME).write_text(json.dumps(record))
    accept(shards)
    (problem,) = problems(shards)
    place = sum(len(document) + 1 for document in documents[:empty])
    assert f"token {place} (offset {2 * place}) ends an empty document: a doubled end" in problem


def test_an_index_that_lies(shards: Path) -> None:
    entry = entry_of(shards)
    path = shards / f"{NAME}.idx"
    data = bytearray(path.read_bytes())
    data[34 + 4 * entry.n_documents + 8] ^= 1  # the second offset
    path.write_bytes(bytes(data))
    accept(shards)
    assert f"{path}: the offsets are not the sums of the lengths" in problems(shards)


def test_other_boundaries(shards: Path) -> None:
    """One token goes from the second document to the first: sums and sizes stay."""
    entry = entry_of(shards)
    lengths = np.frombuffer((shards / f"{NAME}.idx").read_bytes()[34 : 34 + 4 * entry.n_documents], "<i4").copy()
    lengths[0] += 1
    lengths[1] -= 1
    (shards / f"{NAME}.idx").write_bytes(index_bytes(lengths, np.dtype(np.uint16)))
    accept(shards)
    assert any("but no document ends there" in problem for problem in problems(shards))


def test_another_tokenizers_manifest(shards: Path) -> None:
    record = json.loads((shards / MANIFEST_NAME).read_text())
    size = record["vocab_size"]
    record.update(vocab_size=50_277, tokenizer_sha256="0" * 64)
    (shards / MANIFEST_NAME).write_text(json.dumps(record))
    found = problems(shards)
    assert any("tokenizer.json: SHA-256" in problem for problem in found)
    assert any(f"vocabulary 50277, the tokenizer has {size}: another tokenizer's manifest?" in line for line in found)


def test_a_shard_that_nobody_listed(shards: Path) -> None:
    (shards / "train" / "ArXiv" / "00009-000.bin").write_bytes(b"")
    assert problems(shards) == [f"{shards}/train/ArXiv/00009-000.bin: this shard is not in the manifest"]


def test_the_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("verify", shards, "--workers", 2)
    assert "nothing is wrong" in capsys.readouterr().out
    for suffix in (".bin", ".idx"):
        (shards / (NAME + suffix)).unlink()
    with pytest.raises(SystemExit) as caught:
        command("verify", shards, "--workers", 2)
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert f"{NAME}.bin: is missing" in printed
    assert "2 problems." in printed
    with pytest.raises(SystemExit) as caught:
        command("verify", shards / "train")
    assert caught.value.code == 2
    assert "not a prepared data folder" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["label", "n_bytes", "order", "split", "input"])
def test_a_manifest_that_was_changed(shards: Path, change: str) -> None:
    """What no shard can tell: which domain it is, how much text, in which order they come."""
    path = shards / MANIFEST_NAME
    before = path.read_text()
    record = json.loads(before)
    train = record["shards"]["train"]
    if change == "order":
        train.reverse()
    elif change == "split":
        record["shards"]["test"].append(train.pop())
    elif change == "input":
        record["source"]["inputs"].pop()
    else:
        train[0][change] = "Books" if change == "label" else train[0][change] + 1
    assert not list(plan_problems(shards, read_manifest(shards)))
    path.write_text(json.dumps(record))
    expected = f"{path}: is not what groups says; delete it and run `tokenize` again"
    assert list(plan_problems(shards, read_manifest(shards))) == [expected]
    with pytest.raises(SystemExit):
        command("verify", shards, "--workers", 1)
    path.write_text(before)
    shutil.rmtree(shards / "groups")  # whoever passes shards on may leave them out
    assert not list(plan_problems(shards, read_manifest(shards)))
    (shards / JOB_NAME).write_text("{")
    assert "cannot be read" in next(plan_problems(shards, read_manifest(shards)))


def test_a_manifest_with_a_size_that_is_none(shards: Path) -> None:
    record = json.loads((shards / MANIFEST_NAME).read_text())
    record["shards"]["train"][0]["bin_size"] = "1"
    (shards / MANIFEST_NAME).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"manifest\.json: not a readable manifest \(bin_size of shard .* is '1'\)"):
        read_manifest(shards)
