"""What the checkpoint hook says about the time that it takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mamba_train.checkpoint.disk import NotEnoughDiskSpace
from mamba_train.config import CheckpointConfig
from mamba_train.monitor.event_log import EventLog
from mamba_train.ranks import join
from mamba_train.training.hooks import checkpointing
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.state import TrainState


class SlowSaver:
    """Lets a clock go on: 5 seconds for the end of the last save, 1 for the copy of the next."""

    def __init__(self, clock: list[float], full: bool) -> None:
        self._clock, self._full = clock, full

    def wait(self) -> None:
        self._clock[0] += 5.0

    def start(self, *args: Any, **kwargs: Any) -> None:
        self._clock[0] += 1.0
        if self._full:
            raise NotEnoughDiskSpace("the disk is full")


@pytest.mark.parametrize("full", [False, True])
def test_the_hold_up_includes_the_wait_for_the_last_save(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    hook = CheckpointHook(tmp_path, CheckpointConfig(interval_steps=1), join(), {}, {}, EventLog())
    hook._saver = SlowSaver(clock, full)  # type: ignore[assignment]
    engine = SimpleNamespace(pieces=lambda: None)
    trainer: Any = SimpleNamespace(state=TrainState(step=3), data_state=dict, engine=engine)
    hook.on_step(trainer, {})
    metrics: dict[str, Any] = {}
    hook.hold_up.on_step(trainer, metrics)
    assert metrics == {"checkpoint/hold_up_seconds": 6.0}
