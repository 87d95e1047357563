"""What the training loop asks of an engine, whatever shards or replicates the model behind it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mamba_train.config import ModelConfig, OptimConfig
from mamba_train.model.observe import ScanArguments


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step did; equal on all ranks.

    grad_norm: of all gradients together, before clipping. skipped: nothing was changed, because the
    norm was not finite.
    """

    grad_norm: float
    skipped: bool


@dataclass
class EngineState:
    """Weights and optimiser state, whole, fp32, on the CPU, keyed by parameter name.

    optimizer keys are `<parameter>.exp_avg`, `<parameter>.exp_avg_sq` and `<parameter>.step`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Engine(Protocol):
    """Owns the model, its optimiser, and how a step is executed on the devices of this rank."""

    rank: int
    world_size: int
    device: torch.device
    compute_dtype: torch.dtype  # of the matrix products
    model: nn.Module

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        """Make the model with its initial weights, and the optimiser with the groups of the contract."""

    def compute(self) -> AbstractContextManager:
        """The precision that forward passes run in."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`; called once per micro-batch."""

    def step(self, lr: float) -> StepResult:
        """Clip and apply the accumulated gradients, or skip; in both cases leave none behind.

        A skip leaves weights, moments and the optimiser's step count bit-identical (contract C7).
        """

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks, on all ranks."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every parameter, by name."""

    def parameter_groups(self) -> list[tuple[float, list[str]]]:
        """(weight decay, parameter names) of each optimiser group, for the audit."""

    def observe_forward(self, tokens: Tensor) -> list[ScanArguments]:
        """Run the model on `tokens` (batch, length) without gradients and record what each scan receives."""

    def state(self) -> EngineState:
        """A copy of weights and optimiser state that later steps do not change."""

    def load_state(self, state: EngineState) -> None:
        """Put back what `state` returned; raises KeyError for a missing parameter."""
