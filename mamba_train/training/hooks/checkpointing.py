"""When a checkpoint is written, and what happens when the disk is full."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mamba_train.checkpoint import rng
from mamba_train.checkpoint.disk import NotEnoughDiskSpace
from mamba_train.checkpoint.retention import apply_retention
from mamba_train.checkpoint.storage import Checkpoint, save
from mamba_train.config import CheckpointConfig
from mamba_train.data.position import state_of
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer


class CheckpointHook(Hook):
    """Saves every so many steps, at each new best validation loss, and at the end.

    A full disk does not stop the training: the save is left out, loudly, and tried again at the next
    occasion. Only when the last one fails too does the run end with the error. It stands behind
    the hook that records metrics, so that a checkpoint never knows more than metrics.jsonl.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        full_config: Mapping[str, Any],
        fingerprints: dict[str, str],
        log: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._config = config
        self._full_config = dict(full_config)
        self._fingerprints = fingerprints
        self._log = log
        self._saved_step: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        # What was resumed from is on the disk already.
        self._saved_step = trainer.state.step

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        state = trainer.state
        is_new_best = self._config.keep_best and state.best_validation_step == state.step
        if state.step % self._config.interval_steps and not is_new_best:
            return
        try:
            self._save(trainer)
        except NotEnoughDiskSpace as error:
            self._log(f"warning: {error}; the checkpoint of step {state.step} was not saved, training goes on")

    def on_end(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.state.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        state, engine_state = trainer.state, trainer.engine.state()
        checkpoint = Checkpoint(
            step=state.step,
            model=engine_state.model,
            optimizer=engine_state.optimizer,
            rng=rng.capture(),
            state={"train": state.to_json(), "data": state_of(trainer.source, state.samples)},
            config=self._full_config,
            fingerprints=self._fingerprints,
        )
        save(self._directory, checkpoint, reserve_gib=self._config.reserve_gib)
        self._saved_step = state.step
        apply_retention(
            self._directory,
            keep_last=self._config.keep_last,
            permanent_interval_steps=self._config.permanent_interval_steps,
            best_step=state.best_validation_step if self._config.keep_best else None,
        )
