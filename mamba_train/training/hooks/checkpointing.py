"""When a checkpoint is written, and what happens when the disk is full."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_train.checkpoint import rng
from mamba_train.checkpoint.disk import NotEnoughDiskSpace
from mamba_train.checkpoint.retention import apply_retention
from mamba_train.checkpoint.saving import Saver
from mamba_train.checkpoint.storage import Record
from mamba_train.config import CheckpointConfig
from mamba_train.monitor.event_log import EventLog
from mamba_train.ranks import Ranks
from mamba_train.training.forward_check import forward_loss
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer


@dataclass
class HoldUp(Hook):
    """Adds `checkpoint/hold_up_seconds` to the step after a save: how long the training stood still for it.

    Also for the one before it, when that is still being written.
    """

    seconds: list[float] = field(default_factory=list)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if self.seconds:
            metrics["checkpoint/hold_up_seconds"] = sum(self.seconds)
            self.seconds.clear()


class CheckpointHook(Hook):
    """Saves every so many steps, those to be kept for good included, at each new best validation loss, and at the end.

    The training waits for the copy only; the files are written while it goes on. A full disk does not stop it: the
    save is left out, loudly, and tried again at the next occasion. Only when the last one fails too does the run end
    with the error. It stands behind the hook that records metrics, so that a checkpoint never knows more than
    metrics.jsonl.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        full_config: Mapping[str, Any],
        fingerprints: dict[str, str],
        events: EventLog,
    ) -> None:
        self._directory = directory
        self._config = config
        self._full_config = dict(full_config)
        self._fingerprints = fingerprints
        self._events = events
        self._saver = Saver(directory, ranks, config.reserve_gib)
        self._saved_step: int | None = None
        self.hold_up = HoldUp()

    def on_start(self, trainer: Trainer) -> None:
        # What was resumed from is on the disk already.
        self._saved_step = trainer.state.step

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        state = trainer.state
        is_new_best = self._config.keep_best and state.best_validation_step == state.step
        permanent = self._config.permanent_interval_steps
        is_permanent = permanent is not None and state.step % permanent == 0
        if state.step % self._config.interval_steps and not is_permanent and not is_new_best:
            return
        begin = time.perf_counter()
        self.save_now(trainer)
        self.hold_up.seconds.append(time.perf_counter() - begin)

    def save_now(self, trainer: Trainer) -> None:
        """Save unless the disk is full."""
        try:
            self.settle()
            self._save(trainer)
        except NotEnoughDiskSpace as error:
            self._left_out(trainer.state.step, error)

    def on_end(self, trainer: Trainer) -> None:
        self.settle()
        if self._saved_step != trainer.state.step:
            self._save(trainer)
            self._saver.wait()

    def close(self, failed: bool) -> None:
        self._saver.close(failed)

    def settle(self) -> None:
        """Wait for the last save.

        One whose disk became full on the way is left out; the one that is due now may find room again.
        """
        try:
            self._saver.wait()
        except NotEnoughDiskSpace as error:
            self._left_out(self._saved_step, error)
            self._saved_step = None

    def _left_out(self, step: int | None, error: NotEnoughDiskSpace) -> None:
        text = f"warning: {error}; the checkpoint of step {step} was not saved, training goes on"
        self._events.add("disk full", text, step=step)

    def on_stop(self, trainer: Trainer) -> None:
        self.on_end(trainer)

    def _save(self, trainer: Trainer) -> None:
        state, begin = trainer.state, time.perf_counter()
        values: dict[str, Any] = {"train": state.to_json(), "data": trainer.data_state()}
        if self._config.verify_forward:
            values["forward_loss"] = forward_loss(trainer.engine)
        best_step = state.best_validation_step if self._config.keep_best else None
        # While steps are refused the checkpoint from before them is kept: the run may have to go back to it. After a
        # rollback all are, until the run is calm again: it may have to go back further.
        keep_all = state.guard.rollbacks > 0 or state.guard.refused_in_a_row > 0

        def then() -> None:
            state.save_seconds = time.perf_counter() - begin
            if keep_all:
                return
            apply_retention(
                self._directory,
                keep_last=self._config.keep_last,
                permanent_interval_steps=self._config.permanent_interval_steps,
                best_step=best_step,
            )

        self._saver.start(
            Record(state.step, values, self._full_config, self._fingerprints),
            trainer.engine.pieces(),
            rng.capture(),
            then=then,
        )
        self._saved_step = state.step
