"""What the training loop asks of an engine, whatever shards or replicates the model behind it."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mamba_train.checkpoint.pieces import Pieces
from mamba_train.config import ModelConfig, OptimConfig
from mamba_train.model.observe import ScanArguments
from mamba_train.ranks import Ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Judgement:
    """What is to become of a gradient; equal on all ranks. grad_norm: of the whole of it, before clipping."""

    grad_norm: float
    skip: bool


Judge = Callable[[Tensor], Judgement]
"""Decides on a step; its argument, an fp64 scalar, summed over the ranks is the square of the gradient's norm."""


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did; equal on all ranks.

    grad_norm: of all gradients together, before clipping. skipped: nothing was changed. layer_grad_norms: of the
    gradient of each layer and of what is outside of the layers, before clipping; empty unless the step was skipped or
    engine.layer_grad_norms asks for them.
    """

    grad_norm: float
    skipped: bool
    layer_grad_norms: dict[str, float] = field(default_factory=dict)


def accumulate(engine: "Engine", inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
    """What `Engine.accumulate` does where nothing is recorded."""
    with engine.compute():
        loss = engine.model(inputs, targets, seq_idx) / n_targets
    engine.backward(loss)
    return loss.detach()


class Engine(Protocol):
    """Owns the model, its optimiser, and how a step is executed on the devices of this rank.

    All ranks call its methods in the same order.
    """

    ranks: Ranks
    rank: int
    world_size: int
    device: torch.device
    compute_dtype: torch.dtype  # of the matrix products
    model: nn.Module
    model_config: ModelConfig  # resolved

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        """Make the model with its initial weights, and the optimiser with the groups of the contract."""

    def compute(self) -> AbstractContextManager:
        """The precision that forward passes run in."""

    def micro_batches(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The micro-batches of one step; gradients need to be complete only after the last one."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, once per micro-batch; the step's gradient is the sum over all ranks."""

    def accumulate(self, inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
        """Forward and `backward` of one micro-batch, which is on the device; return its loss, detached.

        inputs, targets: (rows, length) int64; seq_idx: (rows, length) int32 or None: of the same shapes on all ranks.
        n_targets: a scalar, what the sum of the losses is divided by, the same for all micro-batches and ranks of a
        step.
        """

    def step(self, lr: float, judge: Judge | None = None) -> StepResult:
        """Clip and apply the accumulated gradients, or skip, as `judge` says; in both cases leave none behind.

        Without a judge the step is skipped when its norm is not finite. A skip leaves weights, moments and the
        optimiser's step count bit-identical (contract C7).
        """

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks, on all ranks."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every parameter, by name."""

    def parameter_groups(self) -> list[tuple[float, list[str]]]:
        """(weight decay, parameter names) of each optimiser group, for the audit."""

    def observe_forward(self, tokens: Tensor) -> list[ScanArguments]:
        """Run the model on `tokens` (batch, length) without gradients and record what each scan receives."""

    def pieces(self) -> Pieces:
        """The live memory of this rank's part of weights and optimiser state, all fp32.

        Every tensor of the run has an entry on every rank, which may be empty.
        """

    def pieces_changed(self) -> None:
        """To be called after something was written into `pieces`: brings what is derived from them up to date."""


def only_finite(engine: Engine) -> Judge:
    """The judge that refuses what is not finite, and nothing else."""

    def judge(square: Tensor) -> Judgement:
        norm = math.sqrt(engine.sum_over_ranks(square).item())
        return Judgement(norm, skip=not math.isfinite(norm))

    return judge
