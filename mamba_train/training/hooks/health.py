"""SSM health per layer, from a small forward pass every so many steps."""

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.monitor.ssm_health import ssm_health
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer


class HealthHook(Hook):
    """Adds the quantiles of Δ, the range of A and the memory length of each layer to the metrics.

    One extra forward pass over one sequence of the step's batch, outside the step: training itself
    carries no instrumentation.
    """

    def __init__(self, model: ModelConfig, interval_steps: int) -> None:
        mixers = layer_mixers(model)
        self._layers = [layer for layer, mixer in enumerate(mixers) if mixer is not MixerKind.attention]
        self._interval_steps = interval_steps

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        step = trainer.state.step
        if not self._layers or not self._interval_steps:
            return
        if step != 1 and step % self._interval_steps and not trainer.finished:
            return
        if trainer.last_batch is None:  # a stop came after this hook and before the record: its figures are there
            return
        calls = trainer.engine.observe_forward(trainer.last_batch.inputs[:1])
        metrics.update(ssm_health(calls, self._layers))
