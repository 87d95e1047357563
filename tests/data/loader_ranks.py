"""Runs without a model: real processes of several ranks that load (`rank_process.py`), killed for real.

A spec is what `rank_process.py` takes; its files, and what it records of each step, are in the folder `output`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import REPOSITORY

STEPS_TO_BE_KILLED_IN = 3  # then a run waits: however busy the machine is, it does not end before


@dataclass(frozen=True)
class Start:
    """One start of a run: on how many ranks, with how many workers each, in micro-batches of how many rows."""

    world_size: int
    workers: int
    micro_batch_size: int


def launch(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> list[subprocess.Popen]:
    """Start all ranks."""
    output.mkdir(exist_ok=True)
    number = len(list(output.glob("spec-*")))
    path = output / f"spec-{number}.json"
    mine = {**spec, **vars(start), "output": str(output), "rendezvous": str(output / f"rendezvous-{number}")}
    path.write_text(json.dumps({**mine, "swap": swap}))
    script = str(Path(__file__).with_name("rank_process.py"))
    return [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(path)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=(output / f"errors-{number}-{rank}.txt").open("w"),
        )
        for rank in range(start.world_size)
    ]


def records(output: Path) -> list[dict[str, Any]]:
    path = output / "steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def errors(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.glob("errors-*")))


def run_until_killed(spec: dict[str, Any], start: Start, output: Path, step: int) -> None:
    """Start all ranks and kill them all as soon as a step is done, or in one of the next ones."""
    n_before = len(records(output))
    ranks = launch({**spec, "wait_after": step + STEPS_TO_BE_KILLED_IN}, start, output)
    while True:
        done = records(output)[n_before:]
        if done and done[-1]["step"] >= step:
            break
        assert all(rank.poll() is None for rank in ranks), errors(output)
        time.sleep(0.002)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        assert rank.wait() != 0  # the first to be killed may have made the others fail by themselves


def run_to_the_end(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> None:
    for rank in launch(spec, start, output, swap):
        assert rank.wait(timeout=120) == 0, errors(output)
