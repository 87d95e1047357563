"""Entries of the ledger: which steps made no update, and why.

They are in the checkpoint (`TrainState.ledger`), in ledger.jsonl, in the log and in wandb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_train.data.batches import BatchSource
from mamba_train.data.corpus import Corpus
from mamba_train.data.stream_loader import StreamLoader
from mamba_train.parallel.engine import StepResult
from mamba_train.training.guard import Cause, Decision

if TYPE_CHECKING:
    from mamba_train.training.trainer import Trainer

LARGEST_LAYERS = 5
KEPT_DOCUMENTS = 20  # entries whose documents stay in the checkpoint: a large batch has thousands of them


def record_skip(trainer: Trainer, decision: Decision, result: StepResult) -> None:
    """Enter the step that is being made, which was not applied, into the ledger; on all ranks."""
    state = trainer.state
    samples = [state.samples, state.samples + trainer.config.training.global_batch_size]
    loss_limit, norm_limit = trainer.guard.limits
    layers = _largest(result.layer_grad_norms)
    assert decision.cause is not None
    entry: dict[str, Any] = {
        "step": state.step + 1,
        "action": "skip",
        "cause": decision.cause.value,
        "loss": _finite(decision.loss),
        "grad_norm": _finite(decision.grad_norm),
        "loss_limit": _finite(loss_limit),
        "grad_norm_limit": _finite(norm_limit),
        "layers": layers,
        "samples": samples,
        "documents": documents_of(trainer, samples[0]),
    }
    state.skipped_steps.append(state.step + 1)
    state.ledger.append(entry)
    trainer.events.add("skip", _text(entry, decision, trainer.guard.limits), **entry)
    for old in state.ledger[:-KEPT_DOCUMENTS]:
        old.pop("documents", None)  # ledger.jsonl has them


def documents_of(trainer: Trainer, first_sample: int) -> Mapping[str, Sequence[Sequence[int | None]]]:
    """By shard or file, the first and last document of each window of the global batch that is being made.

    On all ranks. Nothing where there are neither.
    """
    source, loader = trainer.source, trainer.loader
    found: dict[str, list[list[int]]] = {}
    if isinstance(loader, StreamLoader):
        return loader.documents(trainer.engine.ranks.sum)
    if not isinstance(source, BatchSource):
        return found
    for corpus, start in source.places(first_sample + np.arange(source.global_batch_size)):
        if not isinstance(corpus, Corpus):
            continue
        for shard, first, last in corpus.documents(start, source.form.length + 1):
            found.setdefault(shard, []).append([first, last])
    return found


def _largest(norms: dict[str, float]) -> list[list[Any]]:
    """Parts of the model with the largest norms, those that are not finite first, which have None."""
    order = sorted(norms, key=lambda part: norms[part] if math.isfinite(norms[part]) else math.inf, reverse=True)
    return [[part, _finite(norms[part])] for part in order[:LARGEST_LAYERS]]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(entry: dict[str, Any], decision: Decision, limits: tuple[float, float]) -> str:
    loss, norm = f"loss {decision.loss:.4g}", f"gradient norm {decision.grad_norm:.4g}"
    values = {
        Cause.not_finite: f"{loss}, {norm}",
        Cause.loss: f"{loss}, at most {limits[0]:.4g} expected; {norm}",
        Cause.grad_norm: f"{norm}, at most {limits[1]:.4g} expected; {loss}",
    }[entry["cause"]]
    layers = ", ".join(
        f"{part} {'not finite' if size is None else f'{size:.3g}'}" for part, size in entry["layers"][:3]
    )
    first, end = entry["samples"]
    return (
        f"step {entry['step']} is skipped: {entry['cause']} ({values}); samples {first} to {end - 1}; "
        f"largest gradients: {layers}"
    )
