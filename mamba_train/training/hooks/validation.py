"""Loss on held-out text, by domain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mamba_train.data.batches import Batch
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import LN_2, Trainer, summed_loss


@dataclass(frozen=True)
class HeldOut:
    """What one domain is judged by, the same on all ranks: batches, and the UTF-8 bytes of their targets' text.

    label: of the domain; "" for the only one.
    """

    label: str
    batches: list[Batch]
    n_bytes: int


class ValidationHook(Hook):
    """Validates every so many steps and after the last one, on the same tokens each time and at each world size.

    Each domain has its loss, and all targets together have the one that chooses the best checkpoint.
    """

    def __init__(self, held_out: Sequence[HeldOut], interval_steps: int) -> None:
        self._held_out = held_out
        self._interval_steps = interval_steps
        self._batches = [(number, batch) for number, domain in enumerate(held_out) for batch in domain.batches]

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if not self._batches or (trainer.state.step % self._interval_steps and not trainer.finished):
            return
        sums = self._sums(trainer)
        for domain, (nats, n_targets) in zip(self._held_out, sums, strict=True):
            if domain.label:
                metrics[f"validation/{domain.label}/loss"] = nats / max(1, n_targets)
                metrics[f"validation/{domain.label}/bits_per_byte"] = nats / LN_2 / max(1, domain.n_bytes)
        nats, n_targets = (sum(column) for column in zip(*sums, strict=True))
        loss = nats / max(1, n_targets)
        metrics["validation/loss"] = loss
        metrics["validation/bits_per_byte"] = nats / LN_2 / max(1, sum(domain.n_bytes for domain in self._held_out))
        state = trainer.state
        best = math.inf if state.best_validation_loss is None else state.best_validation_loss
        if loss < best:  # never true of NaN, which must not become the best
            state.best_validation_loss = loss
            state.best_validation_step = state.step

    @torch.no_grad()
    def _sums(self, trainer: Trainer) -> list[list[float]]:
        """Nats and number of targets of each domain, over the batches of all ranks."""
        engine = trainer.engine
        sums = torch.zeros(len(self._held_out), 2, dtype=torch.float64, device=engine.device)
        for first in range(0, len(self._batches), engine.world_size):
            trainer.check_stop()
            # A rank for which no batch is left reads one again, for nothing: the model of all ranks may be needed
            # for the forward pass of each.
            mine = first + engine.rank
            domain, batch = self._batches[min(mine, len(self._batches) - 1)]
            nats = summed_loss(engine, batch)
            if mine < len(self._batches):
                sums[domain, 0] += nats
                sums[domain, 1] += batch.n_targets
        return engine.sum_over_ranks(sums).tolist()
