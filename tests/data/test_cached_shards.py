"""Shards that are made while they are read: the files of `data_prep tokenize`, in an order that no timing changes."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_train.config_data import BadDocuments, DataConfig, DataSource, MixtureStage
from mamba_train.data import cached_shards
from mamba_train.data.batches import WindowForm
from mamba_train.data.cached_shards import CachedSource, begin, failure_name
from mamba_train.data.corpus import ReadError
from mamba_train.data.position import restore, state_of
from mamba_train.data.shard_job import Job
from mamba_train.data.shard_pool import run_pool
from mamba_train.data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts
from tests.data.streams import write_files, write_tokenizer
from tests.data_prep.helpers import command, contents

LENGTH, BATCH = 32, 8
FORM = WindowForm(LENGTH, with_boundaries=True)
FAILURE = ".failure-of-this-run"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three groups of a megabyte each, in files that hardly compress."""
    folder = tmp_path_factory.mktemp("cached")
    texts = make_texts(400)
    write_tokenizer(folder / "tokenizer.json", texts[::5])
    write_files(folder / "text", [make_texts(1600, seed=i) for i in range(3)], ".jsonl")
    return DataConfig(
        name="stream", source=DataSource.stream, path=str(folder / "text"), tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(folder / "cache"), cache_shards=True, cache_group_mib=1, cache_workers=1,
    )  # fmt: skip


def windows(source: CachedSource, n: int) -> list[tuple[str, int]]:
    return [corpus.place(start) for corpus, start in source.places(np.arange(n))]


def error_of(source: CachedSource) -> str | None:
    """What the source says when it is read; None when it says nothing for half a minute."""
    found: list[str] = []

    def read() -> None:
        try:
            source.batch(0, slice(None))
        except ReadError as error:
            found.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    return found[0] if found else None


def test_the_files_are_those_of_data_prep_and_the_order_is_no_matter_of_time(data: DataConfig, tmp_path: Path) -> None:
    said: list[str] = []
    folder = begin(data, load_tokenizer(data.tokenizer or ""), FAILURE, said.append)[""]
    early = CachedSource({"": folder}, FAILURE, BATCH, 3, FORM)
    first = early.batch(0, slice(None)).tokens  # waits for the first group alone
    n_ready = len(early.groups[""].known)
    n_groups = len(Job.from_json((folder / "job.json").read_text()).groups)
    assert n_groups == 3
    assert n_ready == 1
    give_up = time.monotonic() + 60
    while not any("all shards are finished" in line for line in said):
        assert time.monotonic() < give_up, said
        time.sleep(0.05)

    late = CachedSource({"": folder}, FAILURE, BATCH, 3, FORM)
    late.places(np.array([10**6]))  # all groups are known before the first sample is asked for
    assert np.array_equal(late.batch(0, slice(None)).tokens, first)
    n = late.groups[""].n_windows
    assert n is not None
    found = windows(late, 2 * n)
    assert found == windows(early, 2 * n)
    assert len(set(found[:n])) == len(set(found[n:])) == n
    assert found[:n] != found[n:]
    assert windows(CachedSource({"": folder}, FAILURE, BATCH, 4, FORM), 100) != found[:100]
    assert late.epochs(3 * n) == {"": 3.0}

    out = tmp_path / "prepared"
    settings = ["--tokenizer", data.tokenizer, "--group-mib", 1, "--workers", 1]
    command("tokenize", "--input", data.path, *settings, "--output", out)
    assert contents(folder) == contents(out)
    command("verify", folder, "--workers", 1)

    state = state_of(late, 5 * BATCH)
    assert restore(CachedSource({"": folder}, FAILURE, BATCH, 3, FORM), state, 5, allow_changed=False) == []
    assert begin(data, load_tokenizer(data.tokenizer or ""), FAILURE, said.append) == {"": folder}
    assert "3 of 3 groups of shards are finished" in said[-2] + said[-1]


def test_the_signal_of_a_job_whose_time_is_up_does_not_end_the_making(data: DataConfig, tmp_path: Path) -> None:
    """SLURM sends it to all processes; the run itself stops when it can."""
    fresh = DataConfig(**{**vars(data), "cache_dir": str(tmp_path / "cache")})
    before = set(multiprocessing.active_children())
    folder = begin(fresh, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""]
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1  # before the loader starts processes of its own
    for process in started:
        os.kill(process.pid or 0, signal.SIGUSR1)
    source = CachedSource({"": folder}, FAILURE, BATCH, 3, FORM)
    source.places(np.array([10**6]))  # waits for all groups
    assert len(source.groups[""].known) == 3


def test_what_cannot_be_made_ends_the_waiting_with_the_reason(data: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "text" / "0.jsonl"
    file.parent.mkdir()
    file.write_text('{"text": "good"}\n{"text": 3}\n')
    broken = DataConfig(**{**vars(data), "path": str(file.parent), "cache_dir": str(tmp_path / "cache")})
    folder = begin(broken, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""]
    with pytest.raises(ReadError, match=r"train-00000 will not be made: .*0.jsonl:2: field 'text' .* must be a string"):
        CachedSource({"": folder}, FAILURE, BATCH, 0, FORM).batch(0, slice(None))
    assert (folder / FAILURE).exists()


def test_a_run_that_a_bad_document_has_stopped_goes_on_without_it(data: DataConfig, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text", [make_texts(1600, seed=i) for i in range(2)], ".jsonl")
    with (folder / "001.jsonl").open("a") as stream:
        stream.write("not json\n")
    text = {"path": str(folder), "cache_dir": str(tmp_path / "cache")}
    tokenizer = load_tokenizer(data.tokenizer or "")
    strict = begin(DataConfig(**{**vars(data), **text}), tokenizer, FAILURE, lambda line: None)[""]
    source = CachedSource({"": strict}, FAILURE, BATCH, 3, FORM)
    first = source.batch(0, slice(None)).tokens
    with pytest.raises(ReadError, match=r"; data\.bad_documents=skip leaves such documents out"):
        source.places(np.array([10**6]))
    skip = DataConfig(**{**vars(data), **text, "bad_documents": BadDocuments.skip})
    again = CachedSource({"": begin(skip, tokenizer, FAILURE, lambda line: None)[""]}, FAILURE, BATCH, 3, FORM)
    assert restore(again, state_of(source, 5 * BATCH), 5, allow_changed=False) == []
    assert np.array_equal(again.batch(0, slice(None)).tokens, first)
    again.places(np.array([10**6]))


def test_it_ends_with_the_reason_though_the_disk_is_too_full_to_say_it(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cached_shards, "create_once", full)
    monkeypatch.setattr(cached_shards, "run_pool", lambda *arguments: full(tmp_path, b""))
    fresh = DataConfig(**{**vars(data), "cache_dir": str(tmp_path / "cache")})
    said: list[str] = []
    folder = begin(fresh, load_tokenizer(data.tokenizer or ""), FAILURE, said.append)[""]
    assert error_of(CachedSource({"": folder}, FAILURE, BATCH, 0, FORM)) == (
        f"data.cache_shards: train-00000 will not be made: the log has the reason; is the disk of {folder} full?"
    )
    assert said[-1] == "data.cache_shards: [Errno 28] No space left on device"


def test_groups_that_another_run_left_unfinished_are_made_after_all(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on one text share the folder: the one has begun a group, and is ended in the middle of it."""
    fresh = DataConfig(**{**vars(data), "cache_dir": str(tmp_path / "cache")})
    folder = Path(begin(data, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""])
    work = tmp_path / "cache" / folder.name / ".work"
    work.mkdir(parents=True)
    found_busy: list[list[str]] = []
    with (work / "train-00001.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def run_and_release(*arguments: Any) -> list[str]:
            found_busy.append(run_pool(*arguments))
            fcntl.flock(other, fcntl.LOCK_UN)
            return found_busy[-1]

        monkeypatch.setattr(cached_shards, "run_pool", run_and_release)
        monkeypatch.setattr(cached_shards, "BUSY_PAUSE_SECONDS", 0.1)
        folder = begin(fresh, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""]
        assert folder == work.parent
        source = CachedSource({"": folder}, FAILURE, BATCH, 3, FORM)
        waits = threading.Thread(target=lambda: source.places(np.array([10**6])), daemon=True)
        waits.start()
        waits.join(60)
    assert found_busy[0] == ["train-00001"]
    assert len(source.groups[""].known) == 3


def test_the_end_of_a_run_is_not_that_of_another_with_the_same_shards(data: DataConfig, tmp_path: Path) -> None:
    fresh = DataConfig(**{**vars(data), "cache_dir": str(tmp_path / "cache")})
    begin(fresh, load_tokenizer(data.tokenizer or ""), ".failure-of-one", lambda line: None)
    before = set(multiprocessing.active_children())
    folder = begin(fresh, load_tokenizer(data.tokenizer or ""), ".failure-of-another", lambda line: None)[""]
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
    give_up = time.monotonic() + 60
    while not (folder / ".failure-of-another").exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    source = CachedSource({"": folder}, ".failure-of-one", BATCH, 3, FORM)
    source.places(np.array([10**6]))
    assert len(source.groups[""].known) == 3
    assert failure_name(tmp_path / "one") != failure_name(tmp_path / "other")


def test_a_text_that_was_written_after_its_shards_is_named(data: DataConfig, tmp_path: Path) -> None:
    file = write_files(tmp_path / "text", [make_texts(50)], ".jsonl") / "000.jsonl"
    edited = DataConfig(**{**vars(data), "path": str(file.parent), "cache_dir": str(tmp_path / "cache")})
    said: list[str] = []
    for _ in range(2):
        folder = begin(edited, load_tokenizer(data.tokenizer or ""), FAILURE, said.append)[""]
        CachedSource({"": folder}, FAILURE, BATCH, 3, FORM).places(np.array([0]))
    assert not any("written after" in line for line in said), said
    later = time.time() + 60
    os.utime(file, (later, later))
    begin(edited, load_tokenizer(data.tokenizer or ""), FAILURE, said.append)
    assert any(f"{file} was written after the shards of this name and size in {folder}" in line for line in said), said


def test_a_text_smaller_than_a_window_is_refused(data: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "text" / "0.jsonl"
    file.parent.mkdir()
    file.write_text('{"text": "good"}\n')
    small = DataConfig(**{**vars(data), "path": str(file.parent), "cache_dir": str(tmp_path / "cache")})
    folder = begin(small, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""]
    assert error_of(CachedSource({"": folder}, FAILURE, BATCH, 0, FORM)) == (
        f"data.sequence_length={LENGTH}: no group of data.path has so many tokens"
    )


def test_a_mixture_of_sources_is_exact_and_each_has_its_own_order(data: DataConfig, tmp_path: Path) -> None:
    root = Path(data.path or "")
    other = write_files(tmp_path / "other", [make_texts(300, seed=9)], ".jsonl")
    mixture = [MixtureStage(0, {"a": 3.0, "b": 1.0}), MixtureStage(300, {"b": 1.0})]
    mixed = DataConfig(**{**vars(data), "path": None, "sources": {"a": str(root), "b": str(other)}, "mixture": mixture})
    folders = begin(mixed, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)
    assert folders["a"] == begin(data, load_tokenizer(data.tokenizer or ""), FAILURE, lambda line: None)[""]
    stages = [(stage.from_step, stage.weights) for stage in mixture]
    source = CachedSource(folders, FAILURE, BATCH, 3, FORM, stages)
    found = [(str(corpus.folder), start) for corpus, start in source.places(np.arange(400 * BATCH))]
    assert sum(folder == str(folders["b"]) for folder, _ in found[:2048]) == 512
    assert all(folder == str(folders["b"]) for folder, _ in found[300 * BATCH :])
    # Of each source window after window, epoch after epoch, whatever is read of the other.
    for name, folder in folders.items():
        places = source.groups[name]
        mine = [start for where, start in found if where == str(folder)]
        assert mine == [places.place(ordinal, 3)[1] for ordinal in range(len(mine))]
    twins = CachedSource({"a": folders["a"], "b": folders["a"]}, FAILURE, BATCH, 3, FORM, stages).groups
    assert [twins["a"].place(n, 3)[1] for n in range(100)] != [twins["b"].place(n, 3)[1] for n in range(100)]
    epochs = source.epochs(400 * BATCH)
    n_windows = source.groups["b"].n_windows
    assert n_windows is not None
    assert epochs["b"] == sum(folder == str(folders["b"]) for folder, _ in found) / n_windows
    assert 2 < source.bytes_per_target(8) < 8
    state = state_of(source, 5 * BATCH)
    assert restore(CachedSource(folders, FAILURE, BATCH, 3, FORM, stages), state, 5, allow_changed=False) == []
    swapped = CachedSource({"a": folders["b"], "b": folders["a"]}, FAILURE, BATCH, 3, FORM, stages)
    with pytest.raises(ValueError, match="are not the checkpoint's"):
        restore(swapped, state, 5, allow_changed=False)
