"""The guard on curves: what is healthy passes, spikes do not, and what is refused leaves no trace in the window."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.config import GuardConfig
from mamba_train.training.guard import Cause, Guard, GuardState
from mamba_train.training.state import TrainState

N_CURVES, N_STEPS = 100, 2000


def noise(generator: np.random.Generator, family: int, n: int) -> np.ndarray:
    """Of scale 1, with tails from those of a normal distribution to some that are heavier than an exponential's."""
    if family == 0:
        return generator.normal(size=n)
    if family == 1:
        return generator.laplace(size=n)
    if family == 2:
        return generator.standard_t(df=6, size=n)
    hard = generator.choice([1.0, 3.0, 6.0], p=[0.9, 0.09, 0.01], size=n)  # some batches are far harder than others
    return generator.normal(size=n) * hard


def healthy_curve(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm of 2,000 steps: warm-up, decay, a drop when the learning rate falls, noise of both."""
    generator = np.random.default_rng(seed)
    step = np.arange(1, N_STEPS + 1)
    floor, start = generator.uniform(1.5, 4.0), generator.uniform(9.0, 11.0)
    power, warmup = generator.uniform(0.3, 0.7), generator.integers(20, 300)
    reached = np.maximum(step - warmup / 2, 1.0)
    loss = floor + (start - floor) * np.minimum(1.0, (reached / 10) ** -power)
    loss -= 0.3 * np.clip((step - 0.8 * N_STEPS) / (0.2 * N_STEPS), 0, 1)
    # Norms are large at first, fall while the learning rate warms up, and creep up again later.
    norm = generator.uniform(0.2, 2.0) * (1 + 8 * np.exp(-step / warmup) + generator.uniform(0, 1) * step / N_STEPS)
    loss_scale, norm_scale = 10 ** generator.uniform(-2.5, -1.3), generator.uniform(0.05, 0.2)
    loss += loss_scale * noise(generator, seed % 4, N_STEPS)
    norm *= np.exp(norm_scale * noise(generator, (seed // 4) % 4, N_STEPS))
    return loss, norm


def run(guard: Guard, losses: np.ndarray, norms: np.ndarray) -> list[Cause | None]:
    """What the guard says of each step."""
    causes = []
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        cause = guard.judge(loss, norm)
        guard.note(loss, norm, cause)
        causes.append(cause)
    return causes


def make_guard(**settings: object) -> Guard:
    return Guard(GuardConfig(**settings), max_grad_norm=1.0, state=GuardState())  # type: ignore[arg-type]


def test_healthy_curves_trigger_nothing_and_planted_spikes_are_all_caught() -> None:
    for seed in range(N_CURVES):
        losses, norms = healthy_curve(seed)
        assert set(run(make_guard(), losses, norms)) == {None}, seed
        generator = np.random.default_rng(1000 + seed)
        planted: dict[int, Cause] = {}
        for step in generator.choice(np.arange(100, N_STEPS), size=6, replace=False).tolist():
            kind = len(planted) % 3
            if kind == 0:
                losses[step] += max(3.5, losses[step])
                planted[step] = Cause.loss
            elif kind == 1:
                norms[step] = 150 * max(1.0, np.median(norms[step - 20 : step]))
                planted[step] = Cause.grad_norm
            else:
                losses[step] = generator.choice([math.nan, math.inf])
                planted[step] = Cause.not_finite
        found = run(make_guard(), losses, norms)
        assert {step: cause for step, cause in enumerate(found) if cause is not None} == planted, seed


def test_a_quiet_curve_has_narrow_bounds() -> None:
    generator = np.random.default_rng(0)
    losses = 3.0 + 0.02 * generator.normal(size=200)
    norms = 0.5 * np.exp(0.1 * generator.normal(size=200))
    guard = make_guard()
    assert set(run(guard, losses, norms)) == {None}
    assert guard.judge(3.7, 0.5) is None
    assert guard.judge(3.9, 0.5) is Cause.loss
    assert guard.judge(3.0, 4.0) is None
    assert guard.judge(3.0, 6.0) is Cause.grad_norm


def test_a_plateau_of_spikes_is_refused_as_long_as_it_lasts() -> None:
    """The spikes do not get into the window, so the hundredth is refused like the first."""
    losses, norms = healthy_curve(0)
    losses[500:600] += 4.0
    found = run(make_guard(), losses, norms)
    assert found[500:600] == [Cause.loss] * 100
    assert set(found[:500] + found[600:]) == {None}


def test_no_value_that_was_refused_is_ever_in_the_window() -> None:
    guard = make_guard(window_steps=16, min_steps=8)
    losses, norms = healthy_curve(3)
    losses[40:50], norms[60] = math.nan, math.inf
    losses[80] = 50.0
    run(guard, losses[:90], norms[:90])
    allowed = [i for i in range(90) if i not in {*range(40, 50), 60, 80}]
    assert guard.state.losses == losses[allowed][-16:].tolist()
    assert guard.state.grad_norms == norms[allowed][-16:].tolist()
    assert guard.state.applied == len(allowed)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 400))
def test_the_window_survives_a_restart_bit_by_bit(seed: int, cut: int) -> None:
    losses, norms = healthy_curve(seed)
    losses[cut + 1] = math.nan
    losses[cut + 2] += 9.0
    config = GuardConfig()
    through, before = make_guard(), make_guard()
    run(through, losses[:450], norms[:450])
    run(before, losses[:cut], norms[:cut])
    state = TrainState(guard=before.state)
    restored = TrainState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))).guard
    after = Guard(config, 1.0, restored)
    assert after.limits == before.limits
    run(after, losses[cut:450], norms[cut:450])
    assert dataclasses.asdict(after.state) == dataclasses.asdict(through.state)
    assert after.limits == through.limits


def test_other_data_or_another_batch_begin_a_window_anew() -> None:
    guard = make_guard()
    losses, norms = healthy_curve(1)
    guard.begin([0, 8])
    run(guard, losses[:200], norms[:200])
    guard.begin([0, 8])
    assert len(guard.state.losses) == 128
    guard.begin([1, 8])
    assert guard.state.losses == []
    assert guard.judge(losses[200] + 9.0, norms[200]) is None
    assert guard.judge(math.nan, norms[200]) is Cause.not_finite


def test_norms_that_are_not_even_clipped_are_never_unusual() -> None:
    """A task that is solved has norms of nothing; one mistake is a thousand times as much, and harmless."""
    guard = make_guard()
    run(guard, np.full(100, 1e-4), np.full(100, 1e-5))
    assert guard.judge(1e-2, 0.9) is None
    assert guard.judge(1e-2, 1.1) is Cause.grad_norm


@pytest.mark.parametrize("window", [1, 5])
def test_without_outliers_only_what_is_not_finite_is_refused(window: int) -> None:
    guard = make_guard(outliers=False, window_steps=window, min_steps=1)
    run(guard, np.full(20, 2.0), np.full(20, 1.0))
    assert guard.judge(1e6, 1e9) is None
    assert guard.judge(2.0, math.inf) is Cause.not_finite


def test_a_row_of_refusals_is_counted_and_ends_with_a_step_that_is_applied() -> None:
    guard = make_guard()
    run(guard, np.array([2.0, math.nan, math.nan]), np.ones(3))
    assert guard.state.refused_in_a_row == 2
    run(guard, np.array([2.0]), np.ones(1))
    assert guard.state.refused_in_a_row == 0
