"""How often the host waits for the GPU in the steady state of a run: once a step, for the decision."""

import warnings
from pathlib import Path

import pytest
import torch

from mamba_train.composition import compose_config
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer
from tests.helpers import TINY_RUN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUIET = (
    "training.validation_interval_steps=1000",
    "checkpoint.interval_steps=1000",
    "logging.ssm_health_interval_steps=0",
)


class CountWaits(Hook):
    """The last hook: what lies between two of its calls is a whole turn of the loop."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught
        self.of_step: list[int] = []

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        found = sum("synchroniz" in str(warning.message) for warning in self._caught)
        self._caught.clear()
        self.of_step.append(found)
        torch.cuda.set_sync_debug_mode("warn")

    def close(self, failed: bool) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_a_step_waits_for_the_gpu_once(tmp_path: Path, corpus: Path, engine: str, graphs: bool) -> None:
    data = ("data=local", f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}")
    more = (f"engine={engine}", "engine.device=cuda", f"engine.cuda_graphs={graphs}", "training.total_steps=19")
    trainer = build_trainer(compose_config([*data, *TINY_RUN, *more, *QUIET, f"run_dir={tmp_path / 'run'}"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counter = CountWaits(caught)
        trainer.hooks = [*trainer.hooks, counter]
        trainer.run()
    assert counter.of_step[5:18] == 13 * [1], counter.of_step
