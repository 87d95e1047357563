"""Only what a CPU can show: which rows there are when memory runs out."""

import argparse

import pytest
import torch

from benchmarks import train_step
from mamba_train.config import EngineConfig, Recompute

PEER_FITS = 5  # sequences, with what it needs besides while it looks for launch shapes


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("for the test")


@pytest.fixture
def peer_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The peer's steps, each by its sequences; more than `PEER_FITS` do not fit, and ours cannot even be built."""
    rows: list[int] = []

    def peer_step(batches: list[torch.Tensor]) -> None:
        rows.append(len(batches[0]))
        if rows[-1] > PEER_FITS:
            no_memory()

    def measure(_: str, step: train_step.Step, run: train_step.Run, *__: object) -> float:
        step(run.batches())
        return 1.0

    monkeypatch.setattr(train_step, "engine_config", lambda *_: EngineConfig(recompute=Recompute.none))
    monkeypatch.setattr(train_step.Run, "batches", lambda run: [torch.zeros(run.rows, run.length + 1)])
    monkeypatch.setattr(train_step, "ours", no_memory)
    monkeypatch.setattr(train_step, "peer", lambda _: peer_step)
    monkeypatch.setattr(train_step, "measure", measure)
    return rows


def test_a_row_without_memory_does_not_end_the_others(peer_rows: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(
        micro_batches=[16, 8, 4], global_batch=None, recompute=[(Recompute.auto, None)], length=4, steps=1, layers=1
    )
    arguments.no_graphs, arguments.no_peer, arguments.kernels = False, False, None
    train_step.table("mamba_130m", arguments, peak=1.0)
    assert peer_rows == [8, 4, 8, 2, 4]  # 16 fail in the warm-up, 8 after it
    lines = capsys.readouterr().out.splitlines()
    assert ["out of memory" in line for line in lines[1:6]] == [True] * 5
    assert len(lines) == 7
    assert lines[6] == ""  # measured, and there is nothing of ours to compare it with
