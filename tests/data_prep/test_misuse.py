"""What goes wrong with the commands is one line that says what to do; and which task of an array a command is."""

import errno
import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from data_prep import tokenize
from data_prep.__main__ import main
from tests.data_prep.conftest import write_rows
from tests.data_prep.helpers import MakePile, command, tokenize_arguments


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder", "x"], "invalid choice"),
        (["--tasks", "2"], "--tasks and --task-index go together"),
        (["--tasks", "2", "--task-index", "2"], "--task-index 2: expected 0 to 1"),
        (["--tokenizer", "no.json"], "--tokenizer=no.json: no such file"),
        (["--max-bad-share", "2"], "expected 0 to 1"),
        (["--workers", "0"], "expected 1 or more"),
        (["--group-mib", "inf"], "expected more than 0 and not that much"),
        (["--checksums", "CHECKSUMS"], "has no line for train/00.jsonl.zst (2 of 2 inputs)"),
        (["--input", "nothing*"], "--input nothing*: no such file"),
    ],
)
def test_misuse_is_one_line(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, more: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pile(1)
    (tmp_path / "sums").write_text("0" * 64 + "  other.jsonl\n")
    more = [str(tmp_path / "sums") if word == "CHECKSUMS" else word for word in more]
    with pytest.raises(SystemExit) as caught:
        command(*tokenize_arguments(tmp_path, tmp_path / "out", tokenizer_file), *more)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_bad_line_ends_the_command_with_its_place(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pile(2)
    with (tmp_path / "raw" / "val.jsonl").open("w") as stream:
        stream.write("[1]\n")
    with pytest.raises(SystemExit) as caught:
        command(*tokenize_arguments(tmp_path, tmp_path / "out", tokenizer_file), f"test={tmp_path}/raw/val.jsonl")
    assert caught.value.code == 2
    assert "raw/val.jsonl:1: expected a JSON object, got list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        ({"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_ID": "3"}, (8, 3)),
        ({"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "1"}, (8, 7)),
    ],
)
def test_slurm_says_which_task_this_is(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tokenize._task(Namespace(tasks=None, task_index=None)) == expected
    assert tokenize._task(Namespace(tasks=5, task_index=4)) == (5, 4)


def test_an_array_of_unknown_size_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    with pytest.raises(ValueError, match="--tasks: SLURM does not say how many tasks"):
        tokenize._task(Namespace(tasks=None, task_index=None))
    assert tokenize._task(Namespace(tasks=5, task_index=4)) == (5, 4)


def test_a_tokenizer_needs_text_and_a_file_to_go_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "raw" / "0.jsonl", [("text", "A")])
    for arguments, message in (
        (
            ["--input", f"validation={tmp_path}/raw", "--output", tmp_path / "a.json"],
            "--input: there is no text to learn",
        ),
        (["--input", tmp_path / "raw", "--output", tmp_path], f"--output {tmp_path}: is a folder"),
    ):
        with pytest.raises(SystemExit):
            command("train-tokenizer", "--vocab-size", 300, *arguments)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_full_disk_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(arguments: Namespace) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # of a write, which names no file

    monkeypatch.setattr(tokenize, "run", full)
    monkeypatch.setattr(sys, "argv", ["data_prep", "tokenize", "--input", "x", "--output", str(tmp_path / "shards")])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    assert (
        capsys.readouterr().err == f"error: --output {tmp_path}/shards: cannot be written (No space left on device)\n"
    )


@pytest.mark.parametrize("command", ["inspect", "verify", "stats"])
def test_a_full_disk_of_a_command_that_prints_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(arguments: Namespace) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importlib.import_module(f"data_prep.{command}"), "run", full)
    monkeypatch.setattr(sys, "argv", ["data_prep", command, "folder"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
