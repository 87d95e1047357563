"""The numerical guard: which steps are not to be applied, because their loss or gradient norm is out of all bounds.

A step is judged against a window of steps that were applied, which is in the checkpoint. What is refused does not enter
it, so a spike does not widen the bounds for the next one and a NaN cannot poison them. A bound is the median of the
window's newest quarter plus so many standard deviations. These come from the median size of the differences between
neighbours: a loss that falls steeply has small ones, where the distances from a mean would be large and let everything
pass. A floor keeps a very quiet curve from making the guard nervous. The loss is taken as it is, in nats; the gradient
norm by its logarithm, as it is a factor that makes one unusual.

The decision is the same on all ranks because the two values are: they come out of one reduction.
"""

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from mamba_train.config import GuardConfig
from mamba_train.parallel.engine import Engine, Judgement

# The standard deviation of a normal distribution is so many times its median absolute deviation.
MAD_TO_SIGMA = 1.4826
LEAST_NORM = 1e-30  # in the place of 0, which has no logarithm


class Cause(StrEnum):
    """Why a step was not applied."""

    not_finite = "not finite"
    loss = "loss"
    grad_norm = "gradient norm"


@dataclass
class GuardState:
    """What the guard knows, plain values: the last applied steps, and how many were refused in a row.

    context: what makes values comparable; when it changes, the window begins anew. applied: steps since the last
    rollback, or since the start. rollbacks: how many there were without a window of applied steps in between;
    rolled_back_to: the step of the checkpoint that the last one went to.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    context: list[Any] = field(default_factory=list)
    refused_in_a_row: int = 0
    applied: int = 0
    rollbacks: int = 0
    rolled_back_to: int = 0


class Guard:
    """Judges steps by `state`, which it keeps up to date.

    max_grad_norm: what gradients are clipped to; a norm below it is never unusual.
    """

    def __init__(self, config: GuardConfig, max_grad_norm: float, state: GuardState) -> None:
        self._config = config
        self._max_grad_norm = max_grad_norm
        self.state = state
        self._limits = self._find_limits()

    @property
    def limits(self) -> tuple[float, float]:
        """The greatest loss and gradient norm that the next step may have."""
        return self._limits

    def begin(self, context: list[Any]) -> None:
        """Say what the next step is made of: another mixture or batch size has other losses and norms."""
        if self.state.context != context:
            self.state.context, self.state.losses, self.state.grad_norms = context, [], []
            self._limits = self._find_limits()

    def judge(self, loss: float, grad_norm: float) -> Cause | None:
        """Why a step with these values must not be applied; None when it may."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Cause.not_finite
        loss_limit, norm_limit = self._limits
        if loss > loss_limit:
            return Cause.loss
        return Cause.grad_norm if grad_norm > norm_limit else None

    def note(self, loss: float, grad_norm: float, cause: Cause | None) -> None:
        """Take in what became of the step that was judged; to be called when the update has been queued."""
        state, window = self.state, self._config.window_steps
        if cause is not None:
            state.refused_in_a_row += 1
            return
        state.refused_in_a_row = 0
        state.applied += 1
        if state.applied >= window:
            state.rollbacks = 0
        state.losses = [*state.losses, loss][-window:]
        state.grad_norms = [*state.grad_norms, grad_norm][-window:]
        self._limits = self._find_limits()

    def _find_limits(self) -> tuple[float, float]:
        config, state = self._config, self.state
        if not config.outliers or len(state.losses) < min(config.min_steps, config.window_steps):
            return math.inf, math.inf
        middle, sigma = level_and_noise(state.losses)
        loss_limit = middle + max(config.loss_rise, config.deviations * sigma)
        middle, sigma = level_and_noise([math.log(max(norm, LEAST_NORM)) for norm in state.grad_norms])
        log_limit = middle + max(math.log(config.norm_ratio), config.deviations * sigma)
        norm_limit = math.exp(log_limit) if log_limit < 700 else math.inf
        return loss_limit, max(norm_limit, self._max_grad_norm)


def level_and_noise(values: list[float]) -> tuple[float, float]:
    """Where a series is now, and the standard deviation of its noise; both whatever a few of the values are."""
    level = statistics.median(values[-max(1, len(values) // 4) :])
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    # The difference of two values has twice the variance of each.
    return level, MAD_TO_SIGMA * statistics.median(steps) / math.sqrt(2) if steps else 0.0


class Decision:
    """Judges one step on values of all ranks; what `Engine.step` asks before it updates.

    One reduction and one transfer to the host for everything that the ranks have to agree on in a step. Attributes,
    when it has been asked: `loss`, the mean over the global batch; `cause`; `n_requests` of ranks that want to stop;
    `others`, the sum over the ranks of what was given as `own`; `wait_seconds`, from the call to the answer.
    """

    def __init__(self, engine: Engine, guard: Guard, loss: Tensor, wants_stop: bool, own: Tensor | None = None) -> None:
        self._engine, self._guard = engine, guard
        self._loss, self._wants_stop, self._own = loss, wants_stop, own
        self.loss = self.grad_norm = math.nan
        self.cause: Cause | None = None
        self.n_requests = 0.0
        self.others: list[float] = []
        self.wait_seconds = 0.0

    def __call__(self, square: Tensor) -> Judgement:
        """square: this rank's share of the square of the gradient's norm, a scalar in fp64 on the device."""
        request = square.new_full((), float(self._wants_stop))  # a kernel, where `new_tensor` would wait for the GPU
        values = torch.stack([self._loss.double(), square, request])
        if self._own is not None:
            values = torch.cat([values, self._own])
        begin = time.perf_counter()
        # Here the host waits for the backward pass: it must know before the update, as a skip may touch nothing.
        self.loss, whole_square, self.n_requests, *self.others = self._engine.sum_over_ranks(values).tolist()
        self.wait_seconds = time.perf_counter() - begin
        self.grad_norm = math.sqrt(whole_square)
        self.cause = self._guard.judge(self.loss, self.grad_norm)
        return Judgement(self.grad_norm, skip=self.cause is not None)
