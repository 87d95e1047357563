"""The commands as a person gives them, with processes of their own."""

import errno
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import stats, tokenize
from data_prep.__main__ import COMMANDS
from mamba_train.data import shards
from mamba_train.data.documents import SPLITS
from mamba_train.data.manifest import file_sha256, read_manifest
from mamba_train.data.shard_group import GROUPS_FOLDER
from tests.data_prep.conftest import LABELS, write_rows
from tests.data_prep.helpers import (
    REPOSITORY,
    MakePile,
    command,
    contents,
    documents,
    make_shards,
    members,
    start,
    tokenize_arguments,
)

# Each of the small files is a group.
GROUP_OPTIONS = ("--group-mib", 0.001)


def test_workers_and_tasks_change_nothing(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = pile(7)  # not a multiple of the tasks
    found = []
    for workers in (1, 2, 4):
        folder = tmp_path / f"workers-{workers}"
        command(*tokenize_arguments(tmp_path, folder, tokenizer_file, *GROUP_OPTIONS, "--workers", workers))
        found.append(contents(folder))
        (record,) = (json.loads(path.read_text()) for path in (folder / "records").iterdir())
        totals = [read_manifest(folder).total(split, kind) for split in SPLITS for kind in ("n_documents", "n_tokens")]
        assert (record["documents"], record["tokens"]) == (sum(totals[::2]), sum(totals[1::2]))
    assert found[0] == found[1] == found[2]
    assert "complete: " in capsys.readouterr().out

    folder = tmp_path / "array"
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    for number in (3, 1, 2):
        assert not (folder / "manifest.json").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        command(*tokenize_arguments(tmp_path, folder, tokenizer_file, *GROUP_OPTIONS))
    assert contents(folder) == found[0]
    manifest = read_manifest(folder)
    expected = sorted(text for name, listed in rows.items() if name.startswith("train") for text, _ in listed)
    assert sorted(documents(folder, manifest, "train")) == expected

    folder = tmp_path / "more-tasks-than-groups"
    for index in range(11):
        command(
            *tokenize_arguments(tmp_path, folder, tokenizer_file, *GROUP_OPTIONS),
            "--tasks", 11, "--task-index", index, "--workers", 1,
        )  # fmt: skip
    assert contents(folder) == found[0]


@pytest.mark.slow
def test_killed_at_random_instants_it_goes_on(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    """kill -9 of the command, its workers included in its fate, ten times; then the same bytes."""
    pile(12, 1200)
    generator = random.Random(5)
    arguments = tokenize_arguments(tmp_path, tmp_path / "whole", tokenizer_file, "--workers", 2, *GROUP_OPTIONS)
    process = start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    whole = contents(tmp_path / "whole")
    assert len(read_manifest(tmp_path / "whole").source["inputs"]) == 13
    n_killed = 0
    for attempt in range(10):
        folder = tmp_path / f"killed-{attempt}"
        arguments = tokenize_arguments(tmp_path, folder, tokenizer_file, "--workers", 2, *GROUP_OPTIONS)
        for n_groups in (generator.randrange(7), generator.randrange(7, 13)):
            process = start(*arguments)
            while process.poll() is None and len(list((folder / GROUPS_FOLDER).glob("*.json"))) < n_groups:
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.1 if n_groups else 2.0))  # it takes about a second to begin
            process.send_signal(signal.SIGKILL)
            n_killed += process.wait() == -signal.SIGKILL
        process = start(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        found = contents(folder)
        assert {name: data for name, data in found.items() if not name.startswith(".")} == whole
    assert n_killed >= 10


@pytest.mark.slow
def test_an_array_whose_tasks_run_at_the_same_time(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    """Three tasks, and each of them twice, as when a scheduler starts one again too early."""
    pile(12, 300)
    command(*tokenize_arguments(tmp_path, tmp_path / "one", tokenizer_file, *GROUP_OPTIONS, "--workers", 1))
    arguments = tokenize_arguments(tmp_path, tmp_path / "array", tokenizer_file, *GROUP_OPTIONS, "--workers", 1)
    processes = [start(*arguments, "--tasks", 3, "--task-index", index) for index in (0, 1, 2, 0, 1, 2)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, outputs
    assert any("complete: " in output for output in outputs)
    assert contents(tmp_path / "array") == contents(tmp_path / "one")


def test_a_tokenizer_that_does_not_fit_leaves_the_one_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "raw" / "0.jsonl", [("some text", "A")])
    (tmp_path / "t.json").write_bytes(b"before")
    write = shards.write_durably

    def full(path: Path, data: bytes) -> None:
        write(path, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_durably", full)
    with pytest.raises(SystemExit):
        command("train-tokenizer", "--vocab-size", 300, "--input", tmp_path / "raw", "--output", tmp_path / "t.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "t.json"]
    assert (tmp_path / "t.json").read_bytes() == b"before"


def test_inspect_of_a_split_that_is_empty(tmp_path: Path, tokenizer_file: Path, capsys: Any) -> None:
    write_rows(tmp_path / "raw" / "0.jsonl", [("some text", "A")])
    make_shards([str(tmp_path / "raw")], tmp_path / "out", tokenizer_file)
    for arguments, message in (
        (["--split", "test"], "error: --split test: no documents; the split has nothing"),
        (["--label", "B"], "error: --split train --label B: no documents; the split has A"),
    ):
        with pytest.raises(SystemExit):
            command("inspect", tmp_path / "out", *arguments)
        assert message in capsys.readouterr().err


def test_a_killed_command_leaves_no_worker_behind(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "raw").mkdir()
    os.mkfifo(tmp_path / "raw" / "a.jsonl")  # whoever reads it waits for ever
    process = start(
        "tokenize", "--input", tmp_path / "raw", "--tokenizer", tokenizer_file, "--output", tmp_path / "out"
    )
    give_up = time.monotonic() + 30
    while not (tmp_path / "out" / ".work" / "train-00000.lock").exists():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert len(members(process.pid)) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while members(process.pid):
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("last_act", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: a worker died (exit code -9"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", "error: {out}: [Errno 28] No space left on device"),
    ],
)
def test_a_worker_that_dies_ends_the_command(
    last_act: str, said: str, tmp_path: Path, pile: MakePile, tokenizer_file: Path
) -> None:
    pile(2)
    killing = (
        "import errno, os, signal\n"
        "from mamba_train.data import shard_pool as pool\n"
        "from data_prep.__main__ import main\n"
        "def tokenise_group(*arguments):\n"
        f"    {last_act}\n"
        "pool.tokenise_group = tokenise_group\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    script = tmp_path / "killing.py"
    script.write_text(killing)
    line = [sys.executable, str(script), *map(str, tokenize_arguments(tmp_path, tmp_path / "out", tokenizer_file))]
    found = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert said.format(out=tmp_path / "out") in found.stderr
    assert "Traceback" not in found.stderr


def test_a_worker_that_fails_ends_the_others(tmp_path: Path, tokenizer_file: Path) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", [("some text " * 200, "A"), (" ", "A")])
    os.mkfifo(tmp_path / "raw" / "b.jsonl")  # whoever reads it waits for ever
    process = start(
        "tokenize", "--input", tmp_path / "raw", "--tokenizer", tokenizer_file, "--output", tmp_path / "out",
        "--workers", 2, *GROUP_OPTIONS,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 2
    assert "a.jsonl:2: the text is empty" in output


def test_an_input_that_is_not_what_its_checksum_says_is_refused(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "raw" / "0.jsonl", [("some text", "A")])
    (tmp_path / "SHA256SUMS").write_text(f"{'a' * 64}  0.jsonl\n")
    with pytest.raises(SystemExit):
        command(
            "tokenize", "--input", tmp_path / "raw", "--tokenizer", tokenizer_file, "--output", tmp_path / "out",
            "--checksums", tmp_path / "SHA256SUMS",
        )  # fmt: skip
    assert "raw/0.jsonl: " in (error := capsys.readouterr().err)
    assert "SHA-256" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(name, "--help")
    assert caught.value.code == 0
    assert f"python -m data_prep {name}" in capsys.readouterr().out


def test_checksums_are_matched_by_the_end_of_the_path(tmp_path: Path) -> None:
    file = tmp_path / "SHA256SUMS"
    file.write_text(f"{'a' * 64}  train/00.jsonl.zst\n{'B' * 64} *./01.jsonl.zst\n")
    paths = {name: Path("/raw") / name for name in ("00.jsonl.zst", "part/01.jsonl.zst")}
    assert tokenize._checksums(file, paths) == {"00.jsonl.zst": "a" * 64, "part/01.jsonl.zst": "b" * 64}
    file.write_text("abc  x\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS:1: expected a SHA-256"):
        tokenize._checksums(file, {"x": Path("/x")})
    with pytest.raises(ValueError, match=r"--checksums .*none: cannot be read"):
        tokenize._checksums(tmp_path / "none", {})


def test_checksums_of_files_that_are_called_alike(tmp_path: Path) -> None:
    """Each chunk of SlimPajama has the same names of files."""
    file = tmp_path / "SHA256SUMS"
    file.write_text(
        "".join(f"{n:064}  {split}/chunk{n % 3}/0.jsonl\n" for n, split in enumerate(["train"] * 3 + ["val"]))
    )
    paths = {"0.jsonl": Path("/slim/train/chunk1/0.jsonl")}  # the only input: its name says nothing of the chunk
    assert tokenize._checksums(file, paths) == {"0.jsonl": f"{1:064}"}
    paths = {f"chunk{n}/0.jsonl": Path(f"/elsewhere/chunk{n}/0.jsonl") for n in (1, 2)}
    assert tokenize._checksums(file, paths) == {f"chunk{n}/0.jsonl": f"{n:064}" for n in (1, 2)}
    with pytest.raises(ValueError, match=r"SHA256SUMS: 4 lines could be for /elsewhere/0\.jsonl and differ"):
        tokenize._checksums(file, {"0.jsonl": Path("/elsewhere/0.jsonl")})


def test_a_dataset_that_the_library_streams(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A local folder stands for a name on the hub; each file is a part of the stream."""
    rows = pile(3, 20)
    folder = tmp_path / "hub"
    for number in range(3):
        write_rows(folder / "data" / f"train-{number}.jsonl", rows[f"train/{number:02d}.jsonl.zst"])
    arguments = ["tokenize", "--tokenizer", tokenizer_file, "--label-key", "meta.pile_set_name", "--workers", 2]
    command(*arguments, "--input", f"hf:{folder}", "--output", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    everything = [row for number in range(3) for row in rows[f"train/{number:02d}.jsonl.zst"]]
    for label in LABELS:
        assert documents(tmp_path / "out", manifest, "train", label) == [t for t, other in everything if other == label]
    assert [read["sha256"] for read in manifest.source["inputs"]] == [None] * 3
    assert set(manifest.versions) == {"tokenizers", "datasets"}
    with pytest.raises(SystemExit):
        command(*arguments, "--input", f"test=hf:{folder}", "--output", tmp_path / "no")
    with (folder / "data" / "train-1.jsonl").open("a") as stream:
        stream.write("no json\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(*arguments, "--input", f"hf:{folder}", "--output", tmp_path / "broken")
    assert re.search(
        rf"^error: hf:{folder}/train/2-of-3: cannot be read beyond row \d+ \(", capsys.readouterr().err, re.M
    )


def test_dna(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    generator = random.Random(0)
    sequences = ["".join(generator.choices("ACGTN", k=1000)) for _ in range(5)]
    text = "".join(f">chr{i}\n{sequence[:500]}\n{sequence[500:].lower()}\n" for i, sequence in enumerate(sequences))
    (tmp_path / "raw" / "genome.fna.gz").write_bytes(gzip.compress(text.encode()))
    command("tokenize", "--preset", "dna", "--input", tmp_path / "raw", "--output", tmp_path / "out", "--workers", 1)
    manifest = read_manifest(tmp_path / "out")
    assert documents(tmp_path / "out", manifest, "train") == sequences
    assert (manifest.vocab_size, manifest.total("train", "n_tokens")) == (17, 5 * 1001)
    command("verify", tmp_path / "out", "--workers", 1)
    command("inspect", tmp_path / "out", "--documents", 1, "--tokens", 10)
    printed = capsys.readouterr().out
    assert any(f"{sequence[-9:]}<|endoftext|>" in printed for sequence in sequences)
    command("train-tokenizer", "--preset", "dna", "--input", tmp_path / "raw", "--output", tmp_path / "dna.json")
    assert (tmp_path / "dna.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()


def test_inspect_shows_whole_documents(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pile(2)
    make_shards([f"{tmp_path}/raw/train"], tmp_path / "out", tokenizer_file)
    capsys.readouterr()
    command("inspect", tmp_path / "out", "--label", "ArXiv", "--documents", 10_000, "--tokens", 1000)
    printed = capsys.readouterr().out
    train = {text for name in rows if name.startswith("train") for text, label in rows[name] if label == "ArXiv"}
    assert train
    assert all(text in printed for text in train)
    command("inspect", tmp_path / "out", "--seed", 1)
    first = capsys.readouterr().out
    command("inspect", tmp_path / "out", "--seed", 1)
    assert capsys.readouterr().out == first
    command("inspect", tmp_path / "out", "--seed", 2)
    assert capsys.readouterr().out != first
    with pytest.raises(SystemExit):
        command("inspect", tmp_path / "out", "--label", "GitHub")
    assert "the split has ArXiv, Pile-CC, Wikipedia (en)" in capsys.readouterr().err


def test_stats_counts_and_draws(
    tmp_path: Path,
    pile: MakePile,
    tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pile(3)
    folder = tmp_path / "out"
    manifest = make_shards(
        [f"train={tmp_path}/raw/train", f"validation={tmp_path}/raw/val.jsonl.zst"], folder, tokenizer_file
    )
    assert manifest is not None
    domains = stats.count(folder, manifest)
    assert sum(domain.n_tokens for domain in domains if domain.split == "train") == manifest.total("train", "n_tokens")
    for domain in domains:
        assert domain.counts.sum() == domain.n_documents
        assert (domain.lengths * domain.counts).sum() == domain.n_tokens
    monkeypatch.setenv("HOME", str(tmp_path))
    command("stats", "~/out", "--output=~/drawn.png")
    assert (tmp_path / "drawn.png").is_file()
    command("stats", folder)
    printed = capsys.readouterr().out
    assert all(label in printed for label in LABELS)
    assert f"{domains[0].n_tokens:,}" in printed
    assert (folder / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_percentiles() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 1001)
    domain = stats.Domain("train", "", 0, 0, 0, *np.unique(lengths, return_counts=True))
    for percent in (0.1, 5, 50, 95, 100):
        assert stats.percentile(domain, percent) == np.percentile(lengths, percent, method="inverted_cdf")


def test_train_tokenizer_reads_the_same_share_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, word in enumerate(["alpha", "beta", "gamma"]):
        rows: list[Any] = [(f"{word}{i % 7} " * 300, "A") for i in range(300)]
        write_rows(tmp_path / "raw" / f"{number}.jsonl", rows)
    arguments = ["train-tokenizer", "--input", tmp_path / "raw", "--vocab-size", 300, "--sample-mib", 1]
    for name in ("a.json", "b.json"):
        command(*arguments, "--output", tmp_path / name)
    assert file_sha256(tmp_path / "a.json") == file_sha256(tmp_path / "b.json")
    vocabulary = json.loads((tmp_path / "a.json").read_text())["model"]["vocab"]
    assert {"Ġalpha", "Ġbeta", "Ġgamma"} <= set(vocabulary)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert "tokens, end of document 0, SHA-256" in capsys.readouterr().out
