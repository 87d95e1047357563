"""Saves that are written while the caller goes on, in one process; with several: tests/distributed."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from mamba_train.checkpoint import NotEnoughDiskSpace, complete_steps, disk, load, saving
from mamba_train.checkpoint.pieces import Pieces
from mamba_train.checkpoint.saving import Saver
from mamba_train.checkpoint.storage import Record
from mamba_train.ranks import join


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
