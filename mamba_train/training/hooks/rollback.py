"""Back to the last good checkpoint when several steps in a row could not be applied.

The weights, moments and random states are those of the checkpoint again; the step, the schedule and the data are where
they were: the steps in between pass without an update (contract C3). So whatever led to the trouble, the data of these
steps or the weights that they made, is not met again. The decision is in ledger.jsonl before anything is done, and a
start that finds it there and not in its checkpoint carries it out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mamba_train.checkpoint import storage
from mamba_train.checkpoint.layout import step_folders, step_name
from mamba_train.config import GuardConfig
from mamba_train.monitor.event_log import read_events
from mamba_train.training.guard import Guard
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.hooks.recording import RecordingHook
from mamba_train.training.restoring import restore_tensors
from mamba_train.training.state import TrainState
from mamba_train.training.trainer import Trainer

KIND = "rollback"


class GaveUp(RuntimeError):
    """Steps cannot be applied any more, and going back has not helped or is not possible: a person must look."""


class RollbackHook(Hook):
    """Stands behind the checkpoint hook; all ranks do the same, as what they decide on is the same."""

    def __init__(
        self,
        run_dir: Path,
        directory: Path,
        config: GuardConfig,
        recording: RecordingHook,
        checkpointing: CheckpointHook,
        log: Callable[[str], None],
    ) -> None:
        self._run_dir, self._directory, self._config = run_dir, directory, config
        self._recording, self._checkpointing, self._log = recording, checkpointing, log

    def on_start(self, trainer: Trainer) -> None:
        """Carry out what an earlier start has decided and could not save."""
        state = trainer.state
        done = [entry["step"] for entry in state.ledger if entry["action"] == KIND]
        event = trainer.engine.ranks.first(lambda: self._decided(state.step, done))
        if event is None:
            # A checkpoint of the last of the refused steps is there, and a kill came before the decision.
            self._go_back_if_due(trainer)
            return
        state.ledger += trainer.engine.ranks.first(lambda: self._refused(state.step, event["step"]))
        for _ in range(state.step, event["step"]):  # a stream must be read to be passed over
            trainer.loader.step(state.samples)
            state.samples += trainer.config.training.global_batch_size
            state.tokens += trainer.tokens_per_step
            state.step += 1
        self._go_back(trainer, event)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if not self._go_back_if_due(trainer):
            self._give_up(trainer)

    def _go_back_if_due(self, trainer: Trainer) -> bool:
        """False when the run should go back and cannot."""
        state, after = trainer.state, self._config.rollback_after
        refused = state.guard.refused_in_a_row
        if not after or refused < after:
            return True
        self._checkpointing.settle()
        n_before = state.guard.rollbacks
        # A checkpoint that has led to trouble again is not a good one.
        before = state.step - refused + 1 if n_before == 0 else min(state.step, state.guard.rolled_back_to)
        to_step = None
        if n_before < self._config.max_rollbacks:
            to_step = trainer.engine.ranks.first(lambda: self._newest_good(before))
        if to_step is None:
            return False
        event = {"step": state.step, "to_step": to_step, "number": n_before + 1}
        text = (
            f"back to the checkpoint of step {to_step} after {refused} refused steps in a row; steps {to_step + 1} to "
            f"{state.step} pass without an update"
        )
        trainer.events.add(KIND, text, **event)
        self._go_back(trainer, event)
        return True

    def _give_up(self, trainer: Trainer) -> NoReturn:
        step, guard = trainer.state.step, trainer.state.guard
        refused, n_before = guard.refused_in_a_row, guard.rollbacks
        why = "there is no complete checkpoint before them"
        if n_before:
            why = f"going back {n_before} times has not helped"
        elif not self._config.max_rollbacks:
            why = "guard.max_rollbacks=0 allows no going back"
        text = (
            f"{refused} steps in a row, up to step {step}, could not be applied, and {why}: "
            f"ledger.jsonl in {self._run_dir} says why each was refused; docs/operations.md, what to do"
        )

        def raise_it() -> None:
            raise GaveUp(text)

        trainer.events.add("gave up", text, step=step)
        trainer.engine.ranks.first(raise_it)
        raise AssertionError("not reached")

    def _decided(self, step: int, done: list[int]) -> dict[str, Any] | None:
        """A rollback that the checkpoint at `step` does not know, and that can still be carried out."""
        decided = [event for event in read_events(self._run_dir) if event["kind"] == KIND]
        if not decided:
            return None
        last = decided[-1]
        if last["step"] < step or last["to_step"] > step or last["step"] in done:
            return None
        if storage.verify(self._directory / step_name(last["to_step"])):
            self._log(f"warning: the checkpoint of step {last['to_step']} is gone: the rollback to it is left out")
            return None
        return last

    def _refused(self, after: int, until: int) -> list[dict[str, Any]]:
        """Entries of the ledger for the steps in between that an earlier start has refused, its last word on each."""
        refused = {
            event["step"]: {key: value for key, value in event.items() if key not in ("time", "kind", "text")}
            for event in read_events(self._run_dir)
            if event["kind"] == "skip" and after < event["step"] <= until
        }
        return [refused[step] for step in sorted(refused)]

    def _newest_good(self, before: int) -> int | None:
        for step, path in step_folders(self._directory):
            if step < before and not storage.verify(path):
                return step
        return None

    def _go_back(self, trainer: Trainer, event: dict[str, Any]) -> None:
        """Weights of the checkpoint at event["to_step"], with everything that counts steps as it is."""
        now, step, to_step = trainer.state, event["step"], event["to_step"]
        checkpoint = self._directory / step_name(to_step)
        restore_tensors(checkpoint, trainer.engine, self._log)
        state = TrainState.from_json(storage.read_record(checkpoint).state["train"])
        batch_size = trainer.config.training.global_batch_size
        passed = [now.samples - (step - to_step) * batch_size, now.samples]
        entry = {"step": step, "action": KIND, "to_step": to_step, "number": event["number"], "samples": passed}
        state.step, state.tokens, state.samples = now.step, now.tokens, now.samples
        state.skipped_steps += range(to_step + 1, step + 1)
        state.ledger = [*now.ledger, entry]
        state.wandb_run_id, state.pending_metrics = now.wandb_run_id, None
        state.guard.refused_in_a_row, state.guard.applied = 0, 0
        state.guard.rollbacks, state.guard.rolled_back_to = event["number"], to_step
        trainer.state = state
        trainer.guard = Guard(self._config, trainer.config.optim.max_grad_norm, state.guard)
        self._recording.pass_over(
            {
                "step": skipped,
                "tokens": state.tokens - (step - skipped) * trainer.tokens_per_step,
                "samples": state.samples - (step - skipped) * batch_size,
                "loss": None,
                "skipped": True,
            }
            for skipped in range(to_step + 1, step + 1)
        )
        self._checkpointing.save_now(trainer)
