"""Only what a CPU can show: which rows there are when memory runs out."""

import sys
import types

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
    monkeypatch.setattr(train_step, "matrix_rate", lambda: 1.0)
    monkeypatch.setattr(train_step, "ask_device", lambda _: "none")
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.SimpleNamespace(__version__="none"))
    return rows


def test_a_row_without_memory_does_not_end_the_others(
    peer_rows: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "train_step --models mamba_130m --micro-batches 16 8 4 --length 4 --steps 1 --layers 1"
    monkeypatch.setattr(sys, "argv", command.split())
    train_step.main()
    assert peer_rows == [8, 4, 8, 2, 4]  # 16 fail in the warm-up, 8 after it
    lines = capsys.readouterr().out.splitlines()[2:]
    assert ["out of memory" in line for line in lines[1:6]] == [True] * 5
    assert len(lines) == 7
    assert lines[6] == ""  # measured, and there is nothing of ours to compare it with
