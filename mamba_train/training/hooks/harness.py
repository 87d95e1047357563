"""Tasks of lm-evaluation-harness while the training goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba_train.checkpoint import rng
from mamba_train.config import EvaluationConfig
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.evaluation.results import results_path, task_scores, write_results
from mamba_train.training.hooks.base import Hook, Metrics, write_or_warn
from mamba_train.training.trainer import Trainer


def task_manager(config: EvaluationConfig) -> Any:
    """The harness's own index of tasks; raises ValueError (`evaluation.tasks`) for one that could not be run.

    Their data are read here for once: what is not to be had is better known before the first step than at the first
    evaluation.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.task_folder)
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"evaluation.tasks: lm-evaluation-harness has no task {unknown[0]}; `mamba-train lm-eval ls tasks` lists "
            "them, evaluation.task_folder names a folder with others"
        )
    try:
        loaded = manager.load(list(config.tasks))["tasks"]
    except Exception as error:  # whatever a definition, a file or the host of the data has to say
        raise ValueError(f"evaluation.tasks: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if writing := [name for name, task in loaded.items() if task.OUTPUT_TYPE == "generate_until"]:
        raise ValueError(
            f"evaluation.tasks: {writing[0]} has the model write text, which is too slow during training; run it on a "
            "checkpoint by `mamba-train lm-eval`"
        )
    return manager


class HarnessHook(Hook):
    """Adds `evaluation/TASK/METRIC` every so many steps and after the last one.

    All ranks answer all requests, as the model of all of them may be needed for each forward pass. The generators
    of the run, which the harness seeds, are put back.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        manager: Any,
        tokenizer: TextTokenizer,
        max_length: int,
        run_dir: Path,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._manager = config, manager
        self._tokenizer, self._max_length, self._run_dir, self._log = tokenizer, max_length, run_dir, log

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        interval = self._config.interval_steps
        if not trainer.finished and (not interval or trainer.state.step % interval):
            return
        import lm_eval  # seconds that a run without tasks does not need

        from mamba_train.evaluation.harness import HarnessModel

        model = HarnessModel(
            self._tokenizer, _logits(trainer), None, max_length=self._max_length, batch_size=self._config.batch_size
        )
        before = rng.capture()
        try:
            results = lm_eval.simple_evaluate(
                model,
                tasks=list(self._config.tasks),
                task_manager=self._manager,
                limit=self._config.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        finally:
            rng.restore(before)
        scores = task_scores(results)
        metrics.update({f"evaluation/{name}": value for name, value in scores.items()})
        if trainer.engine.rank == 0:
            step = trainer.state.step
            path = results_path(self._run_dir, "harness", step)
            content = {"kind": "harness", "step": step, "limit": self._config.limit, "scores": scores}
            write_or_warn(lambda: write_results(path, content), self._log)


def _logits(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    engine = trainer.engine

    def logits(tokens: Tensor) -> Tensor:
        trainer.check_stop()
        with engine.compute():
            return engine.model(tokens.to(engine.device))

    return logits
