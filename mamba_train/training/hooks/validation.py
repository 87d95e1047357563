"""Loss on the held-out split."""

import math

import torch

from mamba_train.data.batches import Batch
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import LN_2, Trainer, summed_loss


class ValidationHook(Hook):
    """Validates every so many steps and after the last one, on the same tokens each time.

    batches: the fixed validation batches of all ranks together; rank r reads every world_size-th.
    bytes_per_token: of the targets in these batches.
    """

    def __init__(self, batches: list[Batch], interval_steps: int, bytes_per_token: float) -> None:
        self._batches = batches
        self._interval_steps = interval_steps
        self._bytes_per_token = bytes_per_token

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.state.step % self._interval_steps and not trainer.finished:
            return
        loss = self._mean_loss(trainer)
        metrics["validation/loss"] = loss
        metrics["validation/bits_per_byte"] = loss / LN_2 / self._bytes_per_token
        state = trainer.state
        best = math.inf if state.best_validation_loss is None else state.best_validation_loss
        if loss < best:  # never true of NaN, which must not become the best
            state.best_validation_loss = loss
            state.best_validation_step = state.step

    @torch.no_grad()
    def _mean_loss(self, trainer: Trainer) -> float:
        """Nats per token over all validation batches of all ranks."""
        engine = trainer.engine
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for first in range(0, len(self._batches), engine.world_size):
            trainer.check_stop()
            if first + engine.rank >= len(self._batches):
                break
            batch = self._batches[first + engine.rank]
            total[0] += summed_loss(engine, batch)
            total[1] += batch.targets.numel()
        nats, n_tokens = engine.sum_over_ranks(total).tolist()
        return nats / n_tokens
