"""Tokens per second and the time that is left, over the steps themselves."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_STEPS = 50


@dataclass(frozen=True)
class StepTiming:
    """This step's seconds; tokens/s over the last steps, and the ETA that follows from them."""

    step_seconds: float
    tokens_per_second: float
    eta_seconds: float


class Throughput:
    """Times steps from `start` to `step`; what runs in between them (validation, a save) is not counted.

    Averages over the last 50 steps. The first step of a process compiles and warms up, so it
    counts only until there is another.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self._warming_up = True
        self._mark = clock()

    def start(self) -> None:
        """A step begins now."""
        self._mark = self._clock()

    def step(self, step: int, n_tokens: int) -> StepTiming:
        """Step number `step` (the first of a run is 1), which took in `n_tokens` tokens, ends now."""
        now = self._clock()
        seconds = max(now - self._mark, 1e-9)
        self._mark = now
        if self._warming_up and self._steps:
            self._steps.clear()
            self._warming_up = False
        self._steps.append((n_tokens, seconds))
        total_seconds = sum(spent for _, spent in self._steps)
        return StepTiming(
            step_seconds=seconds,
            tokens_per_second=sum(tokens for tokens, _ in self._steps) / total_seconds,
            eta_seconds=max(self._total_steps - step, 0) * total_seconds / len(self._steps),
        )
