"""How a model that learns a synthetic task does, at the length it is trained at and far beyond.

All ranks compute the same, as the model of all of them may be needed for a forward pass.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mamba_train.data.synthetic import SyntheticCorpus
from mamba_train.evaluation.results import results_path, write_results
from mamba_train.evaluation.tasks import PAPER, accuracy, table
from mamba_train.training.hooks.base import Hook, Metrics, write_or_warn
from mamba_train.training.trainer import Trainer


class TaskAccuracyHook(Hook):
    """Adds `task/accuracy` at each validation, on samples of the trained length."""

    def __init__(self, corpus: SyntheticCorpus, n_samples: int, interval_steps: int) -> None:
        self._corpus, self._n_samples, self._interval_steps = corpus, n_samples, interval_steps

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.state.step % self._interval_steps and not trainer.finished:
            return
        metrics["task/accuracy"] = accuracy(self._corpus, _logits(trainer), self._n_samples, trainer.check_stop)


class TaskTestHook(Hook):
    """After the last step: the accuracy at each test length, written to `evaluation/` and shown beside the paper's.

    Stands behind the hook that saves: memory grows with the length, and a test that is too long must cost nothing but
    itself.
    """

    def __init__(
        self,
        tests: Sequence[SyntheticCorpus],
        trained_length: int,
        n_samples: int,
        run_dir: Path,
        log: Callable[[str], None],
    ) -> None:
        self._tests = sorted(tests, key=lambda corpus: corpus.length)
        self._trained_length, self._n_samples, self._run_dir, self._log = trained_length, n_samples, run_dir, log

    def on_end(self, trainer: Trainer) -> None:
        found: dict[int, float] = {}
        for corpus in self._tests:
            try:
                found[corpus.length] = accuracy(corpus, _logits(trainer), self._n_samples)
            except torch.OutOfMemoryError:
                self._log(f"warning: {corpus.task} at length {corpus.length:,} needs more memory than this GPU has")
                break
            self._log(f"{corpus.task} at length {corpus.length:,}: {found[corpus.length]:.2%}")
            if trainer.engine.rank == 0:
                write_or_warn(lambda: self._write(trainer, found), self._log)
        if found:
            task = self._tests[0].task
            self._log("\n".join(table(task, self._trained_length, list(found.items()))))
            if trainer.engine.rank == 0:
                write_or_warn(lambda: self._draw(trainer, found), self._log)

    def _write(self, trainer: Trainer, found: dict[int, float]) -> None:
        """After each length, so that what was found is kept whatever comes."""
        task, step = self._tests[0].task, trainer.state.step
        content = {
            "kind": "task",
            "step": step,
            "task": task.value,
            "trained_length": self._trained_length,
            "accuracy": {str(length): value for length, value in found.items()},
            "paper": PAPER[task],
        }
        write_results(results_path(self._run_dir, "task", step), content)

    def _draw(self, trainer: Trainer, found: dict[int, float]) -> None:
        from mamba_train.evaluation.task_figure import task_figure  # matplotlib takes a second to import
        from mamba_train.monitor.figures import png

        task = self._tests[0].task
        path = results_path(self._run_dir, "task", trainer.state.step).with_suffix(".png")
        path.write_bytes(png(task_figure(task, self._trained_length, found)))
        self._log(f"plot: {path}")


def _logits(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    engine = trainer.engine

    def logits(tokens: Tensor) -> Tensor:
        with engine.compute():
            return engine.model(tokens.to(engine.device))

    return logits
