"""What a person sees: plain lines where they are due, a bar that messages do not break."""

import io
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from mamba_train.config import ProgressMode
from mamba_train.monitor.progress import Progress, format_duration, format_line
from tests.helpers import REPOSITORY, environment

METRICS = {
    "step": 120,
    "loss": 3.21,
    "bits_per_byte": 2.31,
    "grad_norm": 0.82,
    "lr": 3e-3,
    "tokens_per_second": 9812.3,
    "mfu": 0.31,
    "memory_gib": 1.2,
    "eta_seconds": 62.0,
    "skipped": False,
}


def run(mode: ProgressMode, terminal: bool, steps: range, total: int, **extra: dict[int, dict[str, Any]]) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None, legacy_windows=False)
    with Progress(mode, total, 10, console) as progress:
        for step in steps:
            progress.update({**METRICS, "step": step, **extra.get("metrics", {}).get(step, {})})
            if progress._live is not None:
                progress._live.refresh()  # as the clock does eight times a second
            if step in extra.get("messages", {}):
                progress.message(str(extra["messages"][step]))
    return file.getvalue()


def test_the_line_holds_every_figure() -> None:
    assert re.sub(" +", " ", format_line(METRICS, 500)) == (
        "step 120/500 loss 3.210 bpb 2.310 grad 0.82 lr 3.0e-03 9,812 tok/s mfu 31% mem 1.2 GiB eta 1:02"
    )


def test_lines_are_aligned_whatever_the_values() -> None:
    sparse = {"step": 7, "loss": None, "grad_norm": None, "skipped": False}
    large = {**METRICS, "step": 500, "loss": 11.5, "tokens_per_second": 512_000.0, "mfu": 0.05, "memory_gib": 70.0}
    lines = [format_line(metrics, 500) for metrics in (METRICS, sparse, large)]
    for label in ("loss", "bpb", "grad", "lr", "tok/s", "mfu", "mem", "eta"):
        assert len({line.index(label) for line in lines}) == 1, label


def test_plain_lines_come_at_the_interval_first_last_validation_and_skipped_steps() -> None:
    metrics = {13: {"validation/loss": 3.4, "validation/bits_per_byte": 2.4}, 17: {"skipped": True, "loss": None}}
    output = run(ProgressMode.plain, False, range(4, 26), 25, metrics=metrics)
    lines = output.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [4, 10, 13, 17, 20, 25]
    assert "validation loss 3.400 bpb 2.400" in lines[2]
    assert lines[3].endswith("SKIPPED")  # for a loss out of bounds, too: the ledger says why
    assert "SKIPPED" not in lines[2]


def test_a_synthetic_task_shows_how_often_the_model_is_right() -> None:
    validated = {**METRICS, "validation/loss": 0.5, "task/accuracy": 0.98765}
    assert format_line(validated, 500).endswith("validation loss 0.500 accuracy 98.8%")
    assert "accuracy" not in format_line({**METRICS, "validation/loss": 0.5}, 500)


@pytest.mark.parametrize(("terminal", "mode"), [(True, ProgressMode.bar), (False, ProgressMode.plain)])
def test_auto_draws_a_bar_only_in_a_terminal(terminal: bool, mode: ProgressMode) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert Progress(ProgressMode.auto, 10, 5, console).mode is mode


@pytest.mark.parametrize("place", ["a pipe without a reader", "a full disk"])
def test_a_run_outlives_what_it_prints_to(place: str) -> None:
    """And ends with 0: what the file could not take must not fail when the interpreter ends, either."""
    script = """
from mamba_train.config import ProgressMode
from mamba_train.monitor.progress import Progress
from tests.helpers import REPOSITORY, environment
with Progress(ProgressMode.plain, 3, 1) as progress:
    for step in (1, 2, 3):
        progress.update({"step": step})
        progress.message("x" * 100_000)
"""
    reader, writer = os.pipe()
    os.close(reader)
    target = writer if place.startswith("a pipe") else os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=target, stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    os.close(target)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the progress cannot be written any more") == 1
    assert "Traceback" not in done.stderr


def test_silent_shows_messages_only() -> None:
    output = run(ProgressMode.silent, False, range(1, 26), 25, messages={3: "saved [bold]x[/bold]"})
    assert output == "saved [bold]x[/bold]\n"


def test_a_long_message_is_one_line_of_a_log() -> None:
    text = "checkpoint " + "x" * 300
    assert text in run(ProgressMode.plain, False, range(1, 3), 2, messages={1: text}).splitlines()


def test_messages_stand_above_the_bar() -> None:
    metrics = {30: {"validation/loss": 3.4, "validation/bits_per_byte": 2.4}}
    output = run(ProgressMode.bar, True, range(1, 51), 50, messages={25: "checkpoint written"}, metrics=metrics)
    screen = Screen()
    screen.feed(output)
    text = [line.rstrip() for line in screen.lines if line.strip()]
    assert text[0] == "checkpoint written"
    assert text[1] == "step 30/50  validation loss 3.400 bpb 2.400"
    assert text[2].startswith("50/50 ━")
    assert text[3].startswith("loss  3.210  bpb 2.310")
    assert len(text) == 4


class Screen:
    """As much of a terminal as the bar uses: text, newline, carriage return, cursor up, erase line."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = 0
        self.column = 0

    def feed(self, output: str) -> None:
        for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", output):
            if token == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif token == "\r":
                self.column = 0
            elif token == "\x1b[2K":
                self.lines[self.row] = ""
            elif token.endswith("A"):
                self.row -= int(token[2:-1])
            elif not token.startswith("\x1b"):
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + token + line[self.column + 1 :]
                self.column += 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0:00"), (62, "1:02"), (3599.6, "1:00:00"), (7322, "2:02:02"), (200_000, "2d 7h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
