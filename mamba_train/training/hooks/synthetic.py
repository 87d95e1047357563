"""How a model that learns a synthetic task does, at the length it is trained at and far beyond."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mamba_train.data.synthetic import SyntheticCorpus
from mamba_train.evaluation.results import results_path, write_results
from mamba_train.evaluation.tasks import PAPER, accuracy, table
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer


class SyntheticTaskHook(Hook):
    """Adds `task/accuracy` at each validation; after the last step tests at all lengths and shows what the paper has.

    All ranks compute the same, as the model of all of them may be needed for a forward pass. Memory grows with the
    length, which is why a test may fail at the longest: what was found before is kept.
    """

    def __init__(
        self,
        trained: SyntheticCorpus,
        tests: Sequence[SyntheticCorpus],
        n_samples: int,
        interval_steps: int,
        run_dir: Path,
        log: Callable[[str], None],
    ) -> None:
        self._trained, self._tests, self._n_samples = trained, tests, n_samples
        self._interval_steps, self._run_dir, self._log = interval_steps, run_dir, log

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.state.step % self._interval_steps and not trainer.finished:
            return
        logits = _logits(trainer)
        metrics["task/accuracy"] = accuracy(self._trained, logits, self._n_samples, trainer.check_stop)

    def on_end(self, trainer: Trainer) -> None:
        task, length = self._trained.task, self._trained.length
        found: list[tuple[int, float]] = []
        for corpus in self._tests:
            found.append((corpus.length, accuracy(corpus, _logits(trainer), self._n_samples)))
            self._log(f"{task} at length {corpus.length:,}: {found[-1][1]:.2%}")
            if trainer.engine.rank == 0:
                write_results(
                    results_path(self._run_dir, "task", trainer.state.step),
                    {
                        "kind": "task",
                        "step": trainer.state.step,
                        "task": task.value,
                        "trained_length": length,
                        "accuracy": {str(tested): value for tested, value in found},
                        "paper": PAPER[task],
                    },
                )
        if found:
            self._log("\n".join(table(task, length, found)))


def _logits(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    engine = trainer.engine

    def logits(tokens: Tensor) -> Tensor:
        with engine.compute():
            return engine.model(tokens.to(engine.device))

    return logits
