"""Tokens/s and ETA follow from the steps alone."""

import pytest

from mamba_train.monitor.throughput import WINDOW_STEPS, Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_and_eta_of_a_steady_run() -> None:
    clock = Clock()
    throughput = Throughput(100, clock)
    for step in range(1, 11):
        throughput.start()
        clock.now += 0.5
        timing = throughput.step(step, 2048)
    assert timing.step_seconds == pytest.approx(0.5)
    assert timing.tokens_per_second == pytest.approx(4096)
    assert timing.eta_seconds == pytest.approx(90 * 0.5)


def test_time_between_a_step_and_the_next_start_is_not_counted() -> None:
    clock = Clock()
    throughput = Throughput(100, clock)
    for step in range(1, 6):
        clock.now += 60.0  # a validation, a checkpoint
        throughput.start()
        clock.now += 0.5
        timing = throughput.step(step, 2048)
    assert timing.tokens_per_second == pytest.approx(4096)
    assert timing.eta_seconds == pytest.approx(95 * 0.5)


def test_a_slow_first_step_counts_only_until_the_second() -> None:
    clock = Clock()
    throughput = Throughput(10, clock)
    clock.now += 30.0
    assert throughput.step(1, 100).eta_seconds == pytest.approx(9 * 30.0)
    clock.now += 1.0
    assert throughput.step(2, 100).eta_seconds == pytest.approx(8 * 1.0)
    clock.now += 3.0
    assert throughput.step(3, 100).tokens_per_second == pytest.approx(200 / 4)


def test_the_rate_forgets_steps_outside_the_window() -> None:
    clock = Clock()
    throughput = Throughput(1000, clock)
    for step in range(1, 2 * WINDOW_STEPS + 3):
        clock.now += 5.0 if step <= WINDOW_STEPS else 1.0
        timing = throughput.step(step, 10)
    assert timing.tokens_per_second == pytest.approx(10.0)


def test_eta_is_zero_at_and_after_the_last_step() -> None:
    clock = Clock()
    throughput = Throughput(2, clock)
    clock.now += 1.0
    assert throughput.step(2, 10).eta_seconds == 0
    clock.now += 1.0
    assert throughput.step(3, 10).eta_seconds == 0
