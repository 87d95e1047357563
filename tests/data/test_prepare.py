import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data import prepare as module
from mamba_train.data.batches import WindowForm
from mamba_train.data.corpus import Corpus
from mamba_train.data.manifest import find_problem, read_manifest
from mamba_train.data.prepare import prepare
from mamba_train.data.tokenizer import END_OF_DOCUMENT, load_tokenizer
from mamba_train.data.validation import validation_sets

MakeConfig = Callable[..., DataConfig]

# A process that prepares, and that kills itself at its n-th write to the file system if asked to.
CHILD = """
import os, signal, sys
from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data.prepare import prepare

path, cache, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

print("ready", flush=True)
sys.stdin.readline()
for name in ("fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
data = DataConfig(name="local", source=DataSource.local, path=path, vocab_size=400, cache_dir=cache)
print(prepare(data, lambda line: print(line, flush=True)))
print("calls", calls)
assert "torch" not in sys.modules
"""


def start_child(path: Path, cache: Path, kill_at: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(path), str(cache), str(kill_at)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(child: "subprocess.Popen[str]") -> tuple[str, str]:
    """Let a child that waits begin (if it has not) and return its output and errors."""
    return child.communicate("\n", timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ignore(line: str) -> None:
    pass


def only_entries(cache: Path) -> list[str]:
    """Names in the cache without the locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_text_becomes_shards(local_config: MakeConfig, jsonl_folder: Path) -> None:
    folder = prepare(local_config(jsonl_folder), ignore)
    names = {"manifest.json", "tokenizer.json"}
    names |= {f"{split}-00000.{suffix}" for split in ("train", "validation") for suffix in ("bin", "idx")}
    assert set(contents(folder)) == names
    assert find_problem(folder) is None
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    expected = sorted(
        json.loads(line)["text"]
        for name in ("a.jsonl", "b.jsonl")
        for line in (jsonl_folder / name).read_text(encoding="utf-8").splitlines()
    )
    found, n_bytes = [], 0
    for split in ("train", "validation"):
        corpus = Corpus.open(folder, split)
        *texts, rest = tokenizer.decode(corpus.tokens()).split(END_OF_DOCUMENT)
        assert rest == ""
        assert len(texts) == corpus.n_documents == np.count_nonzero(corpus.tokens() == 0)
        found += texts
        n_bytes += corpus.n_bytes
        assert corpus.vocab_size == tokenizer.vocab_size > corpus.tokens().max()
    assert sorted(found) == expected
    assert n_bytes == sum(len(text.encode()) for text in expected)


def test_a_literal_end_of_document_stays_text(local_config: MakeConfig, tmp_path: Path) -> None:
    texts = [f"{END_OF_DOCUMENT} number {i} a{END_OF_DOCUMENT}b" for i in range(400)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    folder = prepare(local_config(path), ignore)
    for split in ("train", "validation"):
        corpus = Corpus.open(folder, split)
        assert np.count_nonzero(corpus.tokens() == corpus.eos_id) == corpus.n_documents


def test_one_text_file_and_a_users_tokenizer(local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path) -> None:
    made = prepare(local_config(jsonl_folder), ignore)
    text = "".join(f"line {i} of the text\n" for i in range(500))
    (tmp_path / "one.txt").write_text(text)
    log: list[str] = []
    config = local_config(tmp_path / "one.txt", tokenizer=str(made / "tokenizer.json"), vocab_size=7)
    folder = prepare(config, log.append)
    assert (folder / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    assert any("too few to hold out whole ones" in line for line in log)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    parts = [tokenizer.decode(Corpus.open(folder, s).tokens()[:-1]) for s in ("train", "validation")]
    assert "".join(parts) == text


def test_the_second_time_nothing_is_built(
    local_config: MakeConfig, jsonl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(local_config(jsonl_folder), ignore)

    def build(*arguments: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(module, "_build", build)
    log: list[str] = []
    assert prepare(local_config(jsonl_folder, sequence_length=999), log.append) == folder
    assert log == [f"data: using {folder}"]
    for change in ({"vocab_size": 300}, {"validation_fraction": 0.2}, {"tokenizer": str(folder / "tokenizer.json")}):
        with pytest.raises(AssertionError, match="built again"):
            prepare(local_config(jsonl_folder, **change), ignore)
    (jsonl_folder / "c.txt").write_text("more")
    with pytest.raises(AssertionError, match="built again"):
        prepare(local_config(jsonl_folder), ignore)


def test_the_same_text_has_the_same_fingerprint_and_bytes(
    local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path
) -> None:
    first = prepare(local_config(jsonl_folder), ignore)
    shutil.copytree(jsonl_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    second = prepare(local_config(tmp_path / "copy", name="other/name"), ignore)
    assert first != second
    assert second.name.startswith("other_name-")
    assert contents(first) == contents(second)
    third = prepare(local_config(jsonl_folder, validation_fraction=0.2), ignore)
    assert read_manifest(third).fingerprint != read_manifest(first).fingerprint


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "train-00000.idx").unlink(), "train-00000.idx is missing"),
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"xx"), "train-00000.bin has 2 bytes"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json was changed"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 2}'), "not a readable manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 0}'), "format version 0"),
    ],
)
def test_a_damaged_folder_is_made_again_loudly(
    local_config: MakeConfig, jsonl_folder: Path, damage: Callable[[Path], Any], problem: str
) -> None:
    config = local_config(jsonl_folder)
    folder = prepare(config, ignore)
    whole = contents(folder)
    damage(folder)
    assert problem in (find_problem(folder) or "")
    log: list[str] = []
    assert prepare(config, log.append) == folder
    assert any("WARNING" in line and problem in line for line in log)
    assert contents(folder) == whole
    assert only_entries(folder.parent) == [folder.name]


def test_killed_at_any_write_and_started_again_gives_the_same_bytes(
    local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path
) -> None:
    whole = contents(prepare(local_config(jsonl_folder), ignore))
    output, errors = finish(start_child(jsonl_folder, tmp_path / "undisturbed"))
    assert "calls" in output, errors
    n_calls = int(output.split()[-1])
    instants = sorted({1, 2, n_calls // 3, n_calls // 2, n_calls - 3, n_calls - 2, n_calls - 1, n_calls})
    caches = {kill_at: tmp_path / f"killed-{kill_at}" for kill_at in instants}
    children = {kill_at: start_child(jsonl_folder, cache, kill_at) for kill_at, cache in caches.items()}
    complete = 0
    for kill_at, child in children.items():
        output, errors = finish(child)
        assert child.returncode == -signal.SIGKILL, (kill_at, output, errors)
        for name in only_entries(caches[kill_at]):
            if not name.startswith("."):  # what has a final name is complete
                assert contents(caches[kill_at] / name) == whole
                complete += 1
        folder = prepare(local_config(jsonl_folder, cache_dir=str(caches[kill_at])), ignore)
        assert contents(folder) == whole
        # What the killed process left is gone, unless the second had nothing to do.
        assert only_entries(caches[kill_at]) == [folder.name]
    assert complete == 1  # killed after the last rename


@pytest.mark.parametrize("delay_seconds", [0.0, 0.1])
def test_killed_from_outside(
    local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path, delay_seconds: float
) -> None:
    whole = contents(prepare(local_config(jsonl_folder), ignore))
    child = start_child(jsonl_folder, tmp_path / "killed")
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    assert "preparing" in child.stdout.readline()
    time.sleep(delay_seconds)
    child.kill()
    child.communicate(timeout=60)
    folder = prepare(local_config(jsonl_folder, cache_dir=str(tmp_path / "killed")), ignore)
    assert contents(folder) == whole


def test_several_processes_at_once(local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path) -> None:
    whole = contents(prepare(local_config(jsonl_folder), ignore))
    children = [start_child(jsonl_folder, tmp_path / "shared") for _ in range(3)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    (name,) = only_entries(tmp_path / "shared")
    assert contents(tmp_path / "shared" / name) == whole
    assert sum("prepared in" in output for output, _ in outputs) == 1


def test_without_locks_the_first_rename_wins(
    local_config: MakeConfig, jsonl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    config = local_config(jsonl_folder)
    whole_build = module._build
    nested: list[Path] = []
    first = []

    def build(*arguments: Any) -> None:
        # Another process comes in between and finishes first, and this one publishes after it.
        if not first:
            first.append(True)
            nested.append(prepare(config, ignore))
            first.append(nested[0].stat().st_ino)
        whole_build(*arguments)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(module, "_build", build)
    folder = prepare(config, ignore)
    assert nested == [folder]
    assert folder.stat().st_ino == first[1]  # a reader of it is not disturbed
    assert find_problem(folder) is None
    assert only_entries(folder.parent) == [folder.name]


def test_shards_are_cut_between_documents(
    local_config: MakeConfig, jsonl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Corpus.open(prepare(local_config(jsonl_folder), ignore), "train")
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 2_000)
    with (jsonl_folder / "a.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "long " * 4000}) + "\n")
    folder = prepare(local_config(jsonl_folder, tokenizer=str(whole.folder / "tokenizer.json")), ignore)
    shards = read_manifest(folder).shards["train"]
    assert len(shards) > 5
    for shard in shards:
        assert shard.bin_size <= 2_000 or shard.n_documents == 1
    assert max(shard.bin_size for shard in shards) > 2_000
    corpus = Corpus.open(folder, "train")
    tokens = corpus.tokens()
    assert tokens[-1] == 0
    assert np.count_nonzero(tokens == 0) == corpus.n_documents == whole.n_documents + 1


def test_a_failed_preparation_leaves_nothing(local_config: MakeConfig, jsonl_folder: Path) -> None:
    with (jsonl_folder / "b.jsonl").open("a") as stream:
        stream.write("{\n")
    config = local_config(jsonl_folder)
    with pytest.raises(ValueError, match=r"b\.jsonl:201: invalid JSON"):
        prepare(config, ignore)
    assert only_entries(Path(config.cache_dir)) == []


def test_no_space_left(local_config: MakeConfig, jsonl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = local_config(jsonl_folder)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*No space left on device"):
        prepare(config, ignore)
    assert only_entries(Path(config.cache_dir)) == []


def test_a_cache_that_cannot_be_made(local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*: cannot be written"):
        prepare(local_config(jsonl_folder, cache_dir=str(tmp_path / "file" / "cache")), ignore)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": None}, r"data\.path is not set"),
        ({"path": "/no/such/folder"}, r"data\.path=/no/such/folder: no such file or folder"),
        ({"source": DataSource.stdlib}, r"data\.path=.*: only read with data\.source=local"),
        ({"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        ({"vocab_size": 100}, r"data\.vocab_size=100: expected at least 257"),
        ({"tokenizer": "/no/tokenizer.json"}, r"data\.tokenizer=/no/tokenizer\.json: no such file"),
        ({"text_key": "content"}, r"a\.jsonl:1: no field 'content' \(data\.text_key\)"),
    ],
)
def test_misuse_is_one_line_that_names_the_key(
    local_config: MakeConfig, jsonl_folder: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepare(local_config(**{"path": jsonl_folder, **change}), ignore)
    assert "\n" not in str(caught.value)


def test_too_little_text(local_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt:1: the text is empty"):
        prepare(local_config(tmp_path / "x"), ignore)
    (tmp_path / "x" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no text for the validation split"):
        prepare(local_config(tmp_path / "x"), ignore)


def test_the_standard_library(tmp_path: Path) -> None:
    config = DataConfig(name="stdlib", source=DataSource.stdlib, vocab_size=512, cache_dir=str(tmp_path))
    log: list[str] = []
    folder = prepare(config, log.append)
    train, validation = (Corpus.open(folder, split) for split in ("train", "validation"))
    assert train.n_tokens > 1_000_000
    assert validation.n_tokens > 50_000
    assert 1.5 < train.bytes_per_token < 4
    assert read_manifest(folder).source["n_docstring_modules"] > 10
    tokenizer = load_tokenizer(folder / "tokenizer.json")

    def bytes_per_token(n_sequences: int) -> float:
        [domain] = validation_sets({"": validation}, WindowForm(64, with_boundaries=False), n_sequences)
        return domain.n_bytes(tokenizer) / (64 * domain.n_sequences)

    whole = bytes_per_token(10**6)
    assert whole == pytest.approx(validation.bytes_per_token, rel=1e-3)
    few = bytes_per_token(20)
    assert 0.7 < few / whole < 1.4
    assert few != whole
    assert prepare(config, log.append) == folder
    assert log[-1] == f"data: using {folder}"
