"""Metrics to the eye, to metrics.jsonl and to wandb."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mamba_train.config import LoggingConfig
from mamba_train.monitor.event_log import LEDGER_NAME, EventLog
from mamba_train.monitor.jsonl import METRICS_NAME, JsonlSink
from mamba_train.monitor.progress import Progress
from mamba_train.monitor.wandb_sink import WandbSink
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer

# Starts and ends it sees for itself, and its own failures it cannot be told.
KNOWN_TO_WANDB = ("start", "stopped", "finished", "failed", "tracking")


class CannotRecord(OSError):
    """metrics.jsonl cannot be written: a run would begin, or go on, that leaves no trace or one with steps twice."""


class RecordingHook(Hook):
    """Shows and records each step's metrics; stands behind the hooks that add to them.

    At the start it cuts from metrics.jsonl what lies after the step that the run goes on from.
    """

    def __init__(
        self,
        run_dir: Path,
        progress: Progress,
        logging: LoggingConfig,
        shown_config: Mapping[str, Any],
        events: EventLog,
        log: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._progress = progress
        self._logging = logging
        self._shown_config = shown_config
        self._log = log
        self._events = events
        events.listeners.append(self._on_event)
        self._wandb: WandbSink | None = None
        self._jsonl: JsonlSink | None = None

    def on_start(self, trainer: Trainer) -> None:
        # A step whose hooks were cut short is recorded when they have been done again.
        recorded = trainer.state.step - (trainer.state.pending_metrics is not None)
        trainer.engine.ranks.first(lambda: self._take_up(recorded))
        if trainer.engine.rank == 0:
            self._wandb = WandbSink(
                self._run_dir, self._logging, self._shown_config, trainer.state.wandb_run_id, self._on_failure
            )
            trainer.state.wandb_run_id = self._wandb.run_id
        self._progress.__enter__()

    def _take_up(self, recorded: int) -> None:
        try:
            self._jsonl = JsonlSink(self._run_dir, self._log)
            cut = self._jsonl.cut_at(recorded)
        except OSError as error:
            path = self._run_dir / METRICS_NAME
            raise CannotRecord(
                f"{path} cannot be written ({error.strerror}); the disk may be full, or the file somebody else's"
            ) from error
        if cut is not None:
            self._log(f"metrics after step {recorded} were moved to {cut}")
        if self._jsonl.n_kept < recorded:
            self._log(f"warning: {self._jsonl.path} has {self._jsonl.n_kept:,} of the {recorded:,} steps so far")

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if self._jsonl is not None:
            self._jsonl.log(metrics)
        if self._wandb is not None:
            self._wandb.log(metrics)
        self._progress.update(metrics)

    def pass_over(self, records: Iterable[Metrics]) -> None:
        """Put these records of steps that pass without an update in the place of what was recorded of them."""
        records = list(records)
        if self._jsonl is not None:
            first = records[0]["step"]
            assert first is not None
            try:
                cut = self._jsonl.cut_at(int(first) - 1)
            except OSError as error:  # as with any record: a full disk does not stop the training
                cut = None
                self._events.add("tracking", f"{self._jsonl.path} cannot be cut ({error}): it has some steps twice")
            if cut is not None:
                self._log(f"metrics after step {int(first) - 1} were moved to {cut}")
            for record in records:
                self._jsonl.log(record)

    def on_end(self, trainer: Trainer) -> None:
        skipped = trainer.state.skipped_steps
        if skipped:
            self._log(
                f"warning: {len(skipped)} of {trainer.state.step} steps made no update, the last one step "
                f"{skipped[-1]}; {LEDGER_NAME} in the run folder says why"
            )

    def _on_failure(self, text: str) -> None:
        self._events.add("tracking", text)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if self._wandb is not None and event["kind"] not in KNOWN_TO_WANDB:
            self._wandb.alert(event["kind"], event["text"])

    def close(self, failed: bool) -> None:
        self._progress.__exit__(None, None, None)
        if self._wandb is not None:
            self._wandb.finish(int(failed))
            if command := self._wandb.upload_command:
                self._log(f"wandb: recorded offline; to upload it, where there is internet: {command}")
        if self._jsonl is not None:
            self._jsonl.close()
