"""Saves that are written while the caller goes on, in one process; with several: tests/distributed."""

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from mamba_train.checkpoint import NotEnoughDiskSpace, complete_steps, disk, load, saving
from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.checkpoint.saving import Saver
from mamba_train.checkpoint.storage import Record
from mamba_train.ranks import Launch, Ranks, join


def pieces(value: float) -> Pieces:
    return Pieces.whole({"w": torch.full((4, 3), value)}, {"w.exp_avg": torch.full((4, 3), 10 * value)})


def saved(folder: Path, step: int) -> float:
    checkpoint = load(folder / f"step_{step:08d}")
    assert bool((checkpoint.model["w"] * 10 == checkpoint.optimizer["w.exp_avg"]).all())
    return float(checkpoint.model["w"].mean())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened = threading.Event()
    write = saving.write_rank_files

    def wait_and_write(*args, **kwargs):
        assert opened.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_rank_files", wait_and_write)
    return opened


def test_what_changes_after_the_copy_is_not_saved(folder: Path, gate: threading.Event) -> None:
    saver, live = Saver(folder, join(), reserve_gib=0), pieces(1.0)
    done = []
    saver.start(Record(5), live, {}, then=lambda: done.append(complete_steps(folder)))
    live.model["w"].values.fill_(-1)
    live.optimizer["w.exp_avg"].values.fill_(-1)
    assert complete_steps(folder) == []
    assert done == []
    gate.set()
    saver.wait()
    assert saved(folder, 5) == 1.0
    assert done == [[5]], "what follows a save finds it complete"


def test_the_next_save_waits_for_the_last(folder: Path, gate: threading.Event) -> None:
    saver = Saver(folder, join(), reserve_gib=0)
    saver.start(Record(1), pieces(1.0), {})
    threading.Timer(0.2, gate.set).start()
    saver.start(Record(2), pieces(2.0), {})
    assert 1 in complete_steps(folder)
    saver.close(failed=False)
    assert (saved(folder, 1), saved(folder, 2)) == (1.0, 2.0)


def test_a_disk_that_fills_up_behind_the_back_is_said_at_the_next_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(folder, join(), reserve_gib=0)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saver.start(Record(1), pieces(1.0), {})
        with pytest.raises(NotEnoughDiskSpace, match="became full during the save"):
            saver.wait()
    assert list(folder.iterdir()) == []
    saver.start(Record(2), pieces(2.0), {})
    saver.wait()
    assert complete_steps(folder) == [2]


def test_a_full_disk_is_said_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_free_bytes", lambda folder: 100)
    with pytest.raises(NotEnoughDiskSpace, match="no space for a checkpoint"):
        Saver(folder, join(), reserve_gib=0).start(Record(1), pieces(1.0), {})


def test_other_failures_of_the_thread_are_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "finish", lambda *args: 1 / 0)
    saver = Saver(folder, join(), reserve_gib=0)
    saver.start(Record(1), pieces(1.0), {})
    with pytest.raises(RuntimeError, match="division by zero"):
        saver.wait()
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_does_not_wait_for_a_rank_that_is_gone(
    folder: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "GIVE_UP_SECONDS", 0.05)
    saver = Saver(folder, join(), reserve_gib=0)
    saver.start(Record(1), pieces(1.0), {})
    saver.close(failed=True)
    assert complete_steps(folder) == []
    gate.set()
    saver.close(failed=False)  # it must not write on while the next test counts what is written


class TwoRanks:
    """Savers of two ranks, each in a thread of this process: what they need of each other is in the store."""

    def __init__(self, folder: Path) -> None:
        store = HashStore()
        self.savers = [Saver(folder, Ranks(Launch(rank, 2), store), reserve_gib=0) for rank in (0, 1)]

    def both(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returns for each rank, or the error that it raises."""

        def outcome(rank: int) -> Any:
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(outcome, (0, 1)))

    def start(self, rank: int, step: int, then: Callable[[], object] = lambda: None) -> None:
        """Of `w` each rank has half, of `b` both have all."""
        w, b = torch.arange(12.0).view(4, 3) + step, torch.full((3,), float(step))
        half = Piece((4, 3), 6 * rank, w.view(-1)[6 * rank : 6 * rank + 6])
        self.savers[rank].start(Record(step), Pieces({"w": half, "b": Piece.whole(b, rank == 1)}), {}, then)


def test_two_ranks_save_one_checkpoint(folder: Path) -> None:
    ranks, done = TwoRanks(folder), []
    for step in (5, 6):  # the second in the buffers of the first
        assert (
            ranks.both(lambda rank, step=step: ranks.start(rank, step, lambda: done.append((rank, step)))) == [None] * 2
        )
    assert ranks.both(lambda rank: ranks.savers[rank].wait()) == [None, None]
    assert done == [(0, 5), (0, 6)], "what follows a save is done once"
    for step in (5, 6):
        found = load(folder / f"step_{step:08d}").model
        assert torch.equal(found["w"], torch.arange(12.0).view(4, 3) + step)
        assert found["b"].tolist() == [step] * 3


def test_a_disk_that_only_rank_0_finds_full_is_full_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_free_bytes", lambda folder: 100)
    ranks = TwoRanks(folder)
    errors = ranks.both(lambda rank: ranks.start(rank, 5))
    assert [type(error) for error in errors] == [NotEnoughDiskSpace] * 2
    assert "rank 0 says how much is needed" in str(errors[1])


def test_there_must_be_room_for_what_all_ranks_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half, mib = Piece((2, 2**19), 0, torch.ones(2**19)), 2**20  # 2 of 4 MiB
    saver = Saver(folder, Ranks(Launch(0, 2), HashStore()), reserve_gib=0)
    monkeypatch.setattr(disk, "_free_bytes", lambda folder: 4 * mib)
    with pytest.raises(NotEnoughDiskSpace):
        saver.start(Record(5), Pieces({"w": half}), {})


def test_what_one_rank_cannot_write_no_rank_takes_for_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_rank_files

    def full_for_rank_1(staged: Path, rank: int, *rest: Any) -> Any:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(staged, rank, *rest)

    monkeypatch.setattr(saving, "write_rank_files", full_for_rank_1)
    ranks, done = TwoRanks(folder), []
    assert ranks.both(lambda rank: ranks.start(rank, 5, lambda: done.append(rank))) == [None, None]
    errors = ranks.both(lambda rank: ranks.savers[rank].wait())
    assert [type(error) for error in errors] == [NotEnoughDiskSpace] * 2
    assert (complete_steps(folder), done) == ([], [])


def test_a_run_that_fails_gives_up_a_save_that_another_rank_does_not_finish(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "GIVE_UP_SECONDS", 0.05)
    ranks = TwoRanks(folder)
    ranks.start(0, 5)  # rank 1 is dead
    ranks.savers[0].close(failed=True)
    end = time.monotonic() + 30
    while list(folder.iterdir()):
        assert time.monotonic() < end, "it waits, and what it has written stays"
        time.sleep(0.01)
