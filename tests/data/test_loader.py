"""Batches read ahead by processes: the same tokens, and no process that is in the way."""

import collections
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from mamba_train.data.batches import BatchSource, WindowForm
from mamba_train.data.corpus import Corpus, ReadError
from mamba_train.data.loader import SHIELDED_SIGNALS, BatchLoader
from tests.data.folders import numbered
from tests.helpers import REPOSITORY

MakeCorpus = Callable[..., Corpus]


@pytest.fixture
def source(make_corpus: MakeCorpus) -> BatchSource:
    """Global batches of 12 rows, 5 of them in an epoch."""
    corpora = {name: make_corpus([numbered(first, 20, 24)]) for name, first in (("a", 1), ("b", 1000))}
    stages = [(0, {"a": 0.4, "b": 0.6}), (3, {"b": 1.0})]
    return BatchSource(corpora, 12, 0, WindowForm(16, True, True), stages)


def rows(loader: BatchLoader, step: int) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in loader.step(12 * step)])


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (6, 2)])
def test_ranks_and_micro_batches_divide_the_global_batch(
    source: BatchSource, world_size: int, micro_batch_size: int
) -> None:
    loaders = [BatchLoader(source, rank, world_size, micro_batch_size) for rank in range(world_size)]
    for step in (0, 1, 2, 9, 3, 3):  # forwards, a jump, back, and once more
        parts = [loader.step(12 * step) for loader in loaders]
        assert {batch.tokens.shape[0] for part in parts for batch in part} == {micro_batch_size}
        found = torch.cat([batch.tokens for part in parts for batch in part])
        assert torch.equal(found, source.batch(12 * step, slice(None)).tokens)
    assert loaders[0].wait_seconds > 0


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(5, 1), (2, 12), (3, 8)])
def test_what_does_not_divide_is_refused(source: BatchSource, world_size: int, micro_batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"training\.global_batch_size=12: .*\({micro_batch_size} \* {world_size}\)"):
        BatchLoader(source, 0, world_size, micro_batch_size)


def children(before: set[BaseProcess]) -> list[BaseProcess]:
    """The processes that were started since; other tests may have left theirs."""
    return [process for process in multiprocessing.active_children() if process not in before]


def shoot_at_children(before: set[BaseProcess], n: int) -> None:
    """Send them what ends a job as soon as they exist, which is long before they run code of ours."""
    while len(children(before)) < n:
        time.sleep(0.001)
    for process in children(before):
        for shielded in SHIELDED_SIGNALS:
            os.kill(process.pid or 0, shielded)


def test_workers_give_the_same_batches_and_survive_what_ends_a_job(source: BatchSource) -> None:
    loader = BatchLoader(source, 1, 2, 2, workers=2)
    before = set(multiprocessing.active_children())
    early = threading.Thread(target=shoot_at_children, args=(before, 2))
    early.start()
    try:
        loader.step(0)
        early.join()
        processes = children(before)
        assert len(processes) == 2
        for step in range(1, 30):
            if step in (2, 10):
                for process in processes:
                    for shielded in SHIELDED_SIGNALS:
                        os.kill(process.pid or 0, shielded)
            batches = loader.step(12 * step)
            expected = source.batch(12 * step, slice(6, 12))
            assert torch.equal(torch.cat([batch.tokens for batch in batches]), expected.tokens)
            assert torch.equal(torch.cat([batch.targets for batch in batches]), expected.targets)
            assert expected.seq_idx is not None
            numbers = [batch.seq_idx for batch in batches if batch.seq_idx is not None]
            assert torch.equal(torch.cat(numbers), expected.seq_idx)
        assert all(process.is_alive() for process in processes)
        # Another step than the next one: other workers, the right tokens.
        assert torch.equal(rows(loader, 100), source.batch(1200, slice(6, 12)).tokens)
        assert not any(process.is_alive() for process in processes)
        # A shard that is cut short in the middle of the run.
        path = source.corpora["b"].folder / "train-00000.bin"
        content = path.read_bytes()
        path.write_bytes(content[:100])
        with pytest.raises(ReadError, match=r"train-00000\.bin: token \d+ of 500 is not there") as caught:
            collections.deque((loader.step(12 * step) for step in range(101, 140)), maxlen=0)
        assert "\n" not in str(caught.value)
        # A worker that is gone, as for want of memory.
        path.write_bytes(content)
        loader.step(0)

        def kill_and_go_on() -> None:  # it may be said at once
            os.kill(children(before)[0].pid or 0, signal.SIGKILL)
            collections.deque((loader.step(12 * step) for step in range(1, 100)), maxlen=0)

        with pytest.raises(ReadError, match=r"a process that loads data has died"):
            kill_and_go_on()
    finally:
        loader.close()
    assert not children(before)


def test_the_random_state_of_the_run_is_left_alone(source: BatchSource) -> None:
    before = torch.get_rng_state()
    BatchLoader(source, 0, 1, 4).step(0)
    assert torch.equal(torch.get_rng_state(), before)


def start(scenario: str, folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Start loader_process.py; returns it and the ids of its workers, of which one hangs in a read."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("loader_process.py")), scenario, str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    return process, workers


def is_gone(pid: int) -> bool:
    """Ended, or ended and not yet waited for by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def wait_until_gone(workers: list[int]) -> None:
    """Whoever ends closes its files a little earlier, which is what ends a wait for its output."""
    end = time.monotonic() + 30
    while not all(is_gone(pid) for pid in workers):
        assert time.monotonic() < end, "a worker is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("scenario", ["exit", "close", "raise"])
def test_a_worker_that_hangs_does_not_keep_the_process(make_corpus: MakeCorpus, scenario: str) -> None:
    process, workers = start(scenario, make_corpus([numbered(1, 20, 24)]).folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if scenario == "raise" else 0), errors
    assert ("ZeroDivisionError" in errors) == (scenario == "raise")
    # Python's tracker of semaphores sometimes tells of one that was removed while the process ended.
    assert len([line for line in errors.splitlines() if "resource_tracker" not in line]) < 10
    wait_until_gone(workers)


@pytest.mark.parametrize("scenario", ["killed", "killed in a step"])
def test_a_worker_that_is_killed_with_a_lock_or_in_a_step_is_noticed(make_corpus: MakeCorpus, scenario: str) -> None:
    process, workers = start(scenario, make_corpus([numbered(1, 20, 24)]).folder)
    try:
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "a process that loads data has died" in printed
    wait_until_gone(workers)


def test_workers_do_not_outlive_a_process_that_is_killed(make_corpus: MakeCorpus) -> None:
    process, workers = start("wait", make_corpus([numbered(1, 20, 24)]).folder)
    assert not any(is_gone(pid) for pid in workers)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until_gone(workers)
