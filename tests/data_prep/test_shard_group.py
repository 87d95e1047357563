"""Groups of inputs become shards: the same bytes whatever happens, and nothing is lost."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data import shard_group
from mamba_train.data.corpus import Corpus
from mamba_train.data.manifest import file_sha256, find_problem, read_manifest
from mamba_train.data.prepare import prepare
from mamba_train.data.shard_job import JOB_VERSION, Group, Job, find_inputs, group_inputs
from mamba_train.data.shard_manifest import assemble
from mamba_train.data.shards import ShardReader
from mamba_train.data.text_files import FASTA_SUFFIXES, TEXT_SUFFIXES
from mamba_train.data.tokenizer import dna_tokenizer, load_tokenizer
from tests.data_prep.conftest import LABELS, write_rows
from tests.data_prep.helpers import REPOSITORY, Row, contents, documents, make_shards, pile_inputs, settings

MakePile = Callable[..., dict[str, list[Row]]]


def test_the_pile_becomes_shards_by_domain(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    rows = pile()
    folder = tmp_path / "out"
    manifest = make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    assert manifest is not None
    assert manifest == read_manifest(folder)
    assert find_problem(folder, with_hashes=True) is None
    train = [row for name, listed in rows.items() if name.startswith("train") for row in listed]
    for label in LABELS:
        assert documents(folder, manifest, "train", label) == [text for text, other in train if other == label]
    held_out = documents(folder, manifest, "validation")
    assert sorted(held_out) == sorted(text for text, _ in rows["val.jsonl.zst"])
    assert manifest.shards["test"] == []
    assert manifest.total("train", "n_documents") == len(train)
    assert manifest.total("train", "n_bytes") == sum(len(text.encode()) for text, _ in train)
    for read in manifest.source["inputs"]:
        path = tmp_path / "raw" / read["name"]
        assert (read["sha256"], read["size"]) == (file_sha256(path), path.stat().st_size)
        assert read["n_documents"] == len(rows[read["name"]])
        assert read["n_bytes"] == sum(len(text.encode()) for text, _ in rows[read["name"]])


def test_training_reads_the_folder(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile()
    manifest = make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    assert manifest is not None
    config = DataConfig(name="pile", source=DataSource.shards, path=str(tmp_path / "out"), check_hashes=True)
    corpus = Corpus.open(prepare(config, lambda line: None), "train")
    expected = [ShardReader(tmp_path / "out" / entry.name).tokens for entry in manifest.shards["train"]]
    assert np.array_equal(corpus.tokens(), np.concatenate(expected))


def test_nothing_about_the_place_or_time_is_in_the_manifest(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path
) -> None:
    pile()
    make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "raw", tmp_path / "elsewhere" / "raw")
    make_shards(pile_inputs(tmp_path / "elsewhere"), tmp_path / "out2", tokenizer_file)
    assert contents(tmp_path / "out") == contents(tmp_path / "out2")
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_finished_job_does_nothing(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile()
    make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("damage", ["delete", "truncate", "delete-idx", "delete-entry", "delete-manifest"])
def test_what_is_missing_is_made_again(tmp_path: Path, pile: MakePile, tokenizer_file: Path, damage: str) -> None:
    pile()
    folder = tmp_path / "out"
    make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    before = contents(folder)
    shard = next(folder.glob("train/*/00002-000.bin"))
    if damage == "delete":
        shard.unlink()
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "delete-idx":
        shard.with_suffix(".idx").unlink()
    elif damage == "delete-entry":
        (folder / "groups" / "train-00003.json").unlink()
    else:
        (folder / "manifest.json").unlink()
    assert contents(folder) != before
    make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    assert contents(folder) == before


def test_no_manifest_while_one_group_is_missing(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile(2)
    folder = tmp_path / "out"
    make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file)
    inputs, _ = find_inputs(pile_inputs(tmp_path), "train", TEXT_SUFFIXES, {}, lambda line: None)
    job = Job(JOB_VERSION, settings(tokenizer), {}, group_inputs(inputs, 1))
    (folder / "manifest.json").unlink()
    for group in job.groups:
        entry = folder / "groups" / f"{group.name}.json"
        entry.rename(tmp_path / "aside")
        assert assemble(folder, job) is None
        assert not (folder / "manifest.json").exists()
        (tmp_path / "aside").rename(entry)
    assert assemble(folder, job) == read_manifest(folder)


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the contents do: after a loss of power the name would stand for nothing."""
    flushed: dict[int, int] = {}  # size of a file when it was flushed, by inode
    renamed: dict[Path, int] = {}  # inode of the folder
    done: set[int] = set()  # folders flushed since the last rename in them
    fsync, replace = os.fsync, os.replace

    def fsync_and_tell(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        flushed[status.st_ino] = status.st_size
        done.add(status.st_ino)

    def checked_replace(source: Path, target: Path) -> None:
        status = os.stat(source)
        assert flushed.get(status.st_ino) == status.st_size, source
        if target.suffix == ".json":  # an entry or the manifest: says that others are there
            assert set(renamed.values()) <= done
        replace(source, target)
        renamed[target] = target.parent.stat().st_ino
        done.discard(renamed[target])

    monkeypatch.setattr(os, "fsync", fsync_and_tell)
    monkeypatch.setattr(os, "replace", checked_replace)
    pile(2)
    make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    assert set(renamed.values()) <= done
    assert {path.suffix for path in renamed} == {".bin", ".idx", ".json"}


def test_an_input_that_grows_while_the_job_runs(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pile(2)
    path = tmp_path / "raw" / "train" / "00.jsonl.zst"

    def grow_and_check(folder: Path, group: Group) -> None:
        with path.open("ab") as stream:
            stream.write(zstandard.compress(b'{"text": "more", "meta": {"pile_set_name": "ArXiv"}}\n'))

    monkeypatch.setattr(shard_group, "read_entry", grow_and_check)
    with pytest.raises(ValueError, match=r"00\.jsonl\.zst: has \d+ bytes, \d+ when the job began: was it changed\?"):
        make_shards([str(path)], tmp_path / "out", tokenizer_file)


def test_an_input_without_a_document_is_mentioned(tmp_path: Path, tokenizer_file: Path) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [("text", "A")])
    (tmp_path / "raw" / "b.jsonl").write_text("\n")
    log: list[str] = []
    assert make_shards([f"{tmp_path}/raw"], tmp_path / "out", tokenizer_file, log) is not None
    assert [line for line in log if "WARNING" in line] == [
        f"WARNING: {tmp_path}/raw/b.jsonl: there is no document in it"
    ]


def test_other_inputs_or_settings_are_refused(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile()
    folder = tmp_path / "out"
    make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"--output .*out: .*\(settings\.shard_bytes: \d+ there, 5000 here\)"):
        make_shards(pile_inputs(tmp_path), folder, tokenizer_file, shard_bytes=5000)
    with pytest.raises(ValueError, match=r"--output .*\(groups: 6 there, 1 here\)"):
        make_shards([f"{tmp_path}/raw/val.jsonl.zst"], folder, tokenizer_file)
    other = tmp_path / "other.json"
    other.write_bytes(tokenizer_file.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"--output .*settings\.tokenizer_sha256"):
        make_shards(pile_inputs(tmp_path), folder, other)
    write_rows(tmp_path / "raw" / "train" / "02.jsonl.zst", [("changed", "ArXiv")])
    with pytest.raises(ValueError, match=r"--output .*\(groups\.2\.inputs\.0\.size: "):
        make_shards(pile_inputs(tmp_path), folder, tokenizer_file)
    assert contents(folder) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--output .*full: the folder is not empty and holds no job\.json"):
        make_shards(pile_inputs(tmp_path), tmp_path / "full", tokenizer_file)


def test_shards_are_cut_on_document_boundaries(tmp_path: Path, tokenizer_file: Path) -> None:
    texts = ["a b c " * 20, "one", "x y z " * 2000, "two", "d e f " * 20, "g h i " * 20]
    write_rows(tmp_path / "raw" / "a.jsonl", [(text, "ArXiv") for text in texts])
    folder = tmp_path / "out"
    manifest = make_shards([f"{tmp_path}/raw"], folder, tokenizer_file, shard_bytes=300)
    assert manifest is not None
    entries = manifest.shards["train"]
    assert [entry.name for entry in entries] == [f"train/ArXiv/00000-{n:03d}" for n in range(len(entries))]
    assert documents(folder, manifest, "train") == texts
    assert len(entries) > 3
    over = [entry for entry in entries if entry.bin_size > 300]
    assert [entry.n_documents for entry in over] == [1]  # the long one, whole and alone


def test_documents_are_held_out_by_a_hash(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    rows = pile(4, 100)
    folder = tmp_path / "out"
    inputs = [f"{tmp_path}/raw/train", f"test={tmp_path}/raw/val.jsonl.zst"]
    manifest = make_shards(inputs, folder, tokenizer_file, validation_fraction=0.2)
    assert manifest is not None
    # Nothing is taken from a split that was named.
    assert sorted(documents(folder, manifest, "test")) == sorted(text for text, _ in rows["val.jsonl.zst"])
    train, held_out = documents(folder, manifest, "train"), documents(folder, manifest, "validation")
    everything = [text for name, listed in rows.items() if name.startswith("train") for text, _ in listed]
    assert sorted(train + held_out) == sorted(everything)
    assert 40 < len(held_out) < 130


BAD_LINES = b'not json\n{"text": "", "meta": {"pile_set_name": "A"}}\n{"text": 7}\n{"text": "caf\xe9"}\n'


def test_a_bad_document_stops_the_job(tmp_path: Path, tokenizer_file: Path) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [("fine", "A")])
    with (tmp_path / "raw" / "a.jsonl").open("ab") as stream:
        stream.write(BAD_LINES)
    with pytest.raises(ValueError, match=r"raw/a\.jsonl:2: invalid JSON .*; --bad-documents=skip leaves"):
        make_shards([f"{tmp_path}/raw"], tmp_path / "out", tokenizer_file)
    assert not list((tmp_path / "out").rglob("*.bin*"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_documents_are_skipped_counted_and_limited(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [(f"text {i}", "A") for i in range(96)]
    write_rows(tmp_path / "raw" / "a.jsonl", rows)
    data = (tmp_path / "raw" / "a.jsonl").read_bytes()
    (tmp_path / "raw" / "a.jsonl").write_bytes(BAD_LINES + data)
    with pytest.raises(ValueError, match=r"group train-00000: 4 of 100 documents .* --max-bad-share=0\.03;"):
        make_shards([f"{tmp_path}/raw"], tmp_path / "no", tokenizer_file, bad_documents="skip", max_bad_share=0.03)
    log: list[str] = []
    manifest = make_shards(
        [f"{tmp_path}/raw"], tmp_path / "out", tokenizer_file, log, bad_documents="skip", max_bad_share=0.04
    )
    assert manifest is not None
    assert documents(tmp_path / "out", manifest, "train") == [text for text, _ in rows]
    kinds = {"empty": 1, "invalid JSON": 1, "not UTF-8": 1, "wrong type": 1}
    assert manifest.dropped == kinds
    (read,) = manifest.source["inputs"]
    assert read["skipped"] == kinds
    assert [place for place, _ in read["skipped_first"]] == [1, 2, 3, 4]
    assert sum("left out" in line and "a.jsonl:4: not valid UTF-8" in line for line in log) == 1


def test_a_label_that_is_no_domain(tmp_path: Path, tokenizer_file: Path) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [(f"text {i}", f"http://{i}") for i in range(257)])
    with pytest.raises(ValueError, match=r"--label-key meta\.pile_set_name: more than 256 domains"):
        make_shards([f"{tmp_path}/raw"], tmp_path / "out", tokenizer_file)


def test_a_truncated_file_is_refused_even_where_bad_documents_are_skipped(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path
) -> None:
    pile()
    path = tmp_path / "raw" / "train" / "01.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"01\.jsonl\.zst: the zstd data is truncated"):
        make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file, bad_documents="skip", max_bad_share=1.0)


def unseen_flip(packed: bytes) -> bytes:
    """A copy with one byte changed that decompresses to other JSON without an error."""
    before = json.loads(zstandard.ZstdDecompressor().decompress(packed))
    for place in range(len(packed)):
        data = bytearray(packed)
        data[place] ^= 1
        try:
            row = json.loads(zstandard.ZstdDecompressor().decompress(bytes(data)))
            if row["text"] and row["meta"]["pile_set_name"] and row != before:
                return bytes(data)
        except (zstandard.ZstdError, ValueError, KeyError):
            continue
    raise AssertionError("every flip is noticed")


def test_a_flipped_byte_of_an_input_is_found_by_its_checksum(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "raw" / "a.jsonl.zst"
    write_rows(path, [("text that nothing repeats: qwertyuiop", "A")])
    checksums = {"a.jsonl.zst": file_sha256(path)}
    make_shards([str(path)], tmp_path / "good", tokenizer_file, checksums=checksums)
    path.write_bytes(unseen_flip(path.read_bytes()))
    make_shards([str(path)], tmp_path / "unseen", tokenizer_file)  # zstd itself notices nothing
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: SHA-256 .* --checksums says"):
        make_shards([str(path)], tmp_path / "bad", tokenizer_file, checksums=checksums)


def test_fasta_has_one_token_per_base(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.fa.gz").write_bytes(gzip.compress(b">1\nACGTN\nacgtn\n>2\nRYSWKMBDHVU\n"))
    tokenizer_file = tmp_path / "dna.json"
    tokenizer_file.write_bytes(dna_tokenizer().serialised)
    folder = tmp_path / "out"
    manifest = make_shards([f"{tmp_path}/raw"], folder, tokenizer_file, suffixes=FASTA_SUFFIXES, label_key=None)
    assert manifest is not None
    assert documents(folder, manifest, "train") == ["ACGTNACGTN", "RYSWKMBDHVU"]
    shard = ShardReader(folder / "train/00000-000")
    assert shard.lengths.tolist() == [11, 12]
    assert shard.document(0).tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0]


def test_a_group_that_another_process_makes_is_left_to_it(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pile(1)
    monkeypatch.setattr(shard_group, "LOCK_SECONDS", 0.2)
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with shard_group._lock(tmp_path / "out" / ".work" / "train-00000.lock") as locked:
        assert locked
        with pytest.raises(AssertionError):
            make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file)
    assert find_problem(tmp_path / "out") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data_prep.helpers import make_shards
raw, out, tokenizer, kill_at = sys.argv[1:]
calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "replace", "link"):
    setattr(os, name, counted(getattr(os, name)))
make_shards([f"train={raw}/train", f"validation={raw}/val.jsonl.zst"], Path(out), Path(tokenizer))
assert "torch" not in sys.modules
print(calls)
"""


def test_killed_at_any_write_it_goes_on(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile(2)

    def run(folder: Path, kill_at: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", KILLED, str(tmp_path / "raw"), str(folder), str(tokenizer_file), str(kill_at)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    whole = run(tmp_path / "whole", 0)
    n_calls = int(whole.stdout)
    expected = contents(tmp_path / "whole")
    for kill_at in (1, 4, n_calls // 2, n_calls - 9, n_calls - 1):
        folder = tmp_path / f"killed-{kill_at}"
        assert run(folder, kill_at).returncode == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        assert run(folder, 3).returncode in (0, -signal.SIGKILL)
        make_shards([f"train={tmp_path}/raw/train", f"validation={tmp_path}/raw/val.jsonl.zst"], folder, tokenizer_file)
        assert {n: d for n, d in contents(folder).items() if not Path(n).name.startswith(".")} == expected
        assert [path.name for path in (folder / ".work").iterdir() if path.is_dir()] == []
