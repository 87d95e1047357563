"""Which rank is slow: each rank's own time in a step, compared over the ranks now and then.

Ranks wait for each other, so a step takes all of them equally long; what tells a slow one is the time that is its own:
waiting for its data, and its forward passes. The time that it waits in the reduction at the end is shown beside them.
The times ride along with the reduction that every step makes (`Decision`), every so many steps.

Under FSDP and ZeRO-3 a forward pass gathers weights and so waits for the others: there its time says less. In a CUDA
graph it cannot be measured: in its place is, for all ranks, the shortest time that one of them waited in the reduction.
"""

import platform
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from mamba_train.config import WatchdogConfig
from mamba_train.monitor.event_log import EventLog
from mamba_train.parallel.engine import Engine
from mamba_train.training.hooks.base import Metrics

PARTS = ("data_wait", "forward", "reduction_wait")


class Stragglers:
    """Times of this rank since the last comparison, and what all ranks together say."""

    def __init__(self, config: WatchdogConfig, engine: Engine, events: EventLog) -> None:
        self._config, self._engine, self._events = config, engine, events
        self._on = engine.world_size > 1 and config.straggler_interval_steps > 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        self._is_first_step = True
        self._clock = _Forward(engine.model, engine.device) if self._on else None
        self._hosts: list[str] | None = None
        self._named: set[int] = set()

    def begin(self) -> None:
        """A step begins."""
        if self._clock is not None:
            self._clock.begin()

    def own(self, step: int) -> Tensor | None:
        """What goes into the reduction of this step: this rank's row of a table; None when it is not due."""
        if self._clock is None or step % self._config.straggler_interval_steps or not self._steps:
            return None
        self._seconds["forward"] += self._clock.seconds()
        table = torch.zeros(self._engine.world_size, len(PARTS), dtype=torch.float64)
        table[self._engine.rank] = torch.tensor([self._seconds[part] / self._steps for part in PARTS])
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return table.flatten().to(self._engine.device)

    def add(self, data_wait_seconds: float, reduction_seconds: float) -> None:
        """A step has ended."""
        if self._clock is None:
            return
        if self._is_first_step:  # it compiles, for as long as the caches of this rank's host make it
            self._is_first_step = False
            return
        self._steps += 1
        self._seconds["data_wait"] += data_wait_seconds
        self._seconds["reduction_wait"] += reduction_seconds
        self._clock.end()

    def compare(self, step: int, values: list[float]) -> Metrics:
        """Metrics of the sum over the ranks of what `own` gave; an event when a rank is first far behind the others."""
        if not values:
            return {}
        rows = [values[first : first + len(PARTS)] for first in range(0, len(values), len(PARTS))]
        passes = 0.0 if any(row[1] for row in rows) else min(row[2] for row in rows)
        busy = [row[0] + row[1] + passes for row in rows]
        slowest = max(range(len(busy)), key=lambda rank: busy[rank])
        usual = statistics.median(busy)
        ratio = busy[slowest] / usual if usual > 0 else 1.0
        if ratio > self._config.straggler_ratio and slowest not in self._named:
            self._named.add(slowest)  # once in a start: it may be slow for weeks, and the metrics go on saying so
            self._name(step, slowest, ratio, rows)
        return {
            "ranks/slowest": slowest,
            "ranks/slowest_ratio": ratio,
            "ranks/data_wait_seconds_max": max(row[0] for row in rows),
            "ranks/forward_seconds_max": max(row[1] for row in rows),
            "ranks/forward_seconds_median": statistics.median(row[1] for row in rows),
            "ranks/reduction_wait_seconds_max": max(row[2] for row in rows),
        }

    def _name(self, step: int, slowest: int, ratio: float, rows: list[list[float]]) -> None:
        # On all ranks alike: the first time, they tell each other where they are.
        if self._hosts is None:
            self._hosts = _hosts(self._engine)
        data_wait, forward, reduction_wait = rows[slowest]
        text = (
            f"rank {slowest} on {self._hosts[slowest]} takes {ratio:.2f} times as long as the median of the ranks: "
            f"{1e3 * data_wait:.0f} ms for its data and {1e3 * forward:.0f} ms for its forward passes in a step "
            f"(median {1e3 * statistics.median(row[0] for row in rows):.0f} and "
            f"{1e3 * statistics.median(row[1] for row in rows):.0f} ms)"
        )
        self._events.add(
            "straggler", text, step=step, rank=slowest, host=self._hosts[slowest], ratio=ratio,
            data_wait_seconds=data_wait, forward_seconds=forward, reduction_wait_seconds=reduction_wait,
        )  # fmt: skip


class _Forward:
    """How long the forward passes of a model take, by CUDA events where it computes on a GPU: nobody waits for them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []  # of this step: begin, end, begin, ...
        self._steps: list[list[Any]] = []
        model.register_forward_pre_hook(lambda module, inputs: self._mark())
        model.register_forward_hook(lambda module, inputs, output: self._mark())

    def begin(self) -> None:
        self._marks = []  # what hooks between the steps have computed

    def end(self) -> None:
        self._steps.append(self._marks)
        self._marks = []

    def seconds(self) -> float:
        """Since the last call, without the step that is being made."""
        total = 0.0
        for marks in self._steps:
            for begin, end in zip(marks[::2], marks[1::2], strict=True):
                # The host has waited for these steps long ago.
                total += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        self._steps.clear()
        return total

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        if torch.cuda.is_current_stream_capturing():  # an event in a graph has no time
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def _hosts(engine: Engine) -> list[str]:
    """The host of each rank, on all ranks."""
    ranks = engine.ranks
    key = ranks.new_key()
    ranks.post(f"{key}/{ranks.rank}", platform.node())
    return [ranks.await_post(f"{key}/{rank}") for rank in range(ranks.world_size)]
