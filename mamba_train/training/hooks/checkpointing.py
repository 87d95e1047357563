"""When a checkpoint is written, and what happens when the disk is full."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_train.checkpoint import rng
from mamba_train.checkpoint.disk import NotEnoughDiskSpace
from mamba_train.checkpoint.retention import apply_retention
from mamba_train.checkpoint.saving import Saver
from mamba_train.checkpoint.storage import Record
from mamba_train.config import CheckpointConfig
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
    """Saves every so many steps, at each new best validation loss, and at the end.

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
        log: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._config = config
        self._full_config = dict(full_config)
        self._fingerprints = fingerprints
        self._log = log
        self._saver = Saver(directory, ranks, config.reserve_gib)
        self._saved_step: int | None = None
        self.hold_up = HoldUp()

    def on_start(self, trainer: Trainer) -> None:
        # What was resumed from is on the disk already.
        self._saved_step = trainer.state.step

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        state = trainer.state
        is_new_best = self._config.keep_best and state.best_validation_step == state.step
        if state.step % self._config.interval_steps and not is_new_best:
            return
        begin = time.perf_counter()
        try:
            self._finish_last()
            self._save(trainer)
        except NotEnoughDiskSpace as error:
            self._log(f"warning: {error}; the checkpoint of step {state.step} was not saved, training goes on")
        self.hold_up.seconds.append(time.perf_counter() - begin)

    def on_end(self, trainer: Trainer) -> None:
        self._finish_last()
        if self._saved_step != trainer.state.step:
            self._save(trainer)
            self._saver.wait()

    def close(self, failed: bool) -> None:
        self._saver.close(failed)

    def _finish_last(self) -> None:
        """A save whose disk became full on the way is left out; the one that is due now may find room again."""
        try:
            self._saver.wait()
        except NotEnoughDiskSpace as error:
            self._log(f"warning: {error}; the checkpoint of step {self._saved_step} was not saved, training goes on")
            self._saved_step = None

    def on_stop(self, trainer: Trainer) -> None:
        self.on_end(trainer)

    def _save(self, trainer: Trainer) -> None:
        state, begin = trainer.state, time.perf_counter()
        values: dict[str, Any] = {"train": state.to_json(), "data": trainer.data_state()}
        if self._config.verify_forward:
            values["forward_loss"] = forward_loss(trainer.engine)
        best_step = state.best_validation_step if self._config.keep_best else None

        def then() -> None:
            state.save_seconds = time.perf_counter() - begin
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
