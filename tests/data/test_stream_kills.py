"""Loader processes of a stream, killed (SIGKILL) and started again on other world sizes, workers and micro-batches."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.digests import digest
from tests.data.rank_process import SAVE_INTERVAL, fed
from tests.data.stream_order import (
    mixed,
)
from tests.data.streams import steps_of
from tests.helpers import REPOSITORY


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run: on how many ranks, with how many workers each, in micro-batches of how many rows."""

    world_size: int
    workers: int
    micro_batch_size: int


def launch(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> list[subprocess.Popen]:
    output.mkdir(exist_ok=True)
    number = len(list(output.glob("spec-*")))
    path = output / f"spec-{number}.json"
    places = {"output": str(output), "rendezvous": str(output / f"rendezvous-{number}"), "swap": swap}
    path.write_text(json.dumps({**spec, **dataclasses.asdict(start), **places}))
    script = str(Path(__file__).with_name("stream_process.py"))
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


def run_until_killed(spec: dict[str, Any], start: Start, output: Path, step: int) -> None:
    n_before = len(records(output))
    ranks = launch(spec, start, output)
    while not any(record["step"] >= step for record in records(output)[n_before:]):
        assert all(rank.poll() is None for rank in ranks), errors(output)
        time.sleep(0.002)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        assert rank.wait() == -signal.SIGKILL


def errors(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.glob("errors-*")))


def run_to_the_end(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> None:
    for rank in launch(spec, start, output, swap):
        assert rank.wait(timeout=120) == 0, errors(output)


STARTS = [
    [Start(2, 1, 3), Start(3, 0, 4), Start(1, 3, 6)],
    [Start(6, 0, 1), Start(4, 1, 3), Start(2, 3, 2)],
    [Start(1, 1, 12), Start(6, 0, 2), Start(3, 1, 1)],
]


@pytest.mark.slow
@pytest.mark.parametrize("starts", STARTS, ids=lambda starts: "-".join(str(start.world_size) for start in starts))
def test_killed_twice_and_restarted_with_another_world_size(
    texts: list[str], tokenizer_path: Path, tmp_path: Path, starts: list[Start]
) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    spec["total_steps"] = 60
    expected = [digest(fed(batches)) for batches in itertools.islice(steps_of(spec), 60)]
    output, generator, step = tmp_path / "run", random.Random(str(starts)), 0
    for start in starts[:-1]:
        step += generator.randint(SAVE_INTERVAL + 2, 20)
        run_until_killed(spec, start, output, step)
    run_to_the_end(spec, starts[-1], output)
    done = records(output)
    assert [record["digest"] for record in done] == [expected[record["step"] - 1] for record in done]
    assert {record["step"] for record in done} == set(range(1, 61))
    assert {record["world_size"] for record in done} == {start.world_size for start in starts}


@pytest.mark.slow
def test_swapped_ranks_are_noticed(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    spec["total_steps"] = 3
    expected = [digest(fed(batches)) for batches in itertools.islice(steps_of(spec), 3)]
    run_to_the_end(spec, Start(2, 0, 3), tmp_path / "run", swap=True)
    found = [record["digest"] for record in records(tmp_path / "run")]
    assert len(found) == 3
    assert all(mine != theirs for mine, theirs in zip(found, expected, strict=True))
