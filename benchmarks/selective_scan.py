"""The selective scan of Mamba-1 beside mamba_ssm's, with the floors that bytes and exponentials set.

    python -m benchmarks.selective_scan [--rows many few states random]

One process, one GPU: each row times ours and the peer on inputs of the same shape, dtype and distribution, each in the
layout that it takes without a copy. GPU times are medians over replays of a CUDA graph of several calls, with the
middle half's spread; eager times are what a user sees who calls it from Python.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.selective_scan import selective_scan

# Batch, length, channels, states: batch x channels fill an H100, or don't.
ROWS = {
    "many": [(8, 2048, 5120, 16), (8, 2048, 4096, 16), (8, 2048, 1536, 16), (4, 8192, 5120, 16), (32, 2048, 1536, 16)],
    "few": [(1, 2048, 5120, 16), (1, 32768, 5120, 16), (1, 131072, 2048, 16)],
    "states": [(8, 2048, 2048, n) for n in (8, 32, 64)],
    "random": [
        (random.choice([1, 2, 3, 5, 8]), random.randint(100, 4096), 8 * random.randint(32, 640), 16) for _ in range(5)
    ],
}
EXPONENTIALS_PER_CLOCK = 16  # of one multiprocessor
# The driver clears freed memory in the background, 20 GiB in 35 ms on an H100; kernels have 0.86 of their speed then.
CLEARING_SECONDS = 0.1


@dataclass
class Time:
    """Milliseconds of one call."""

    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:8.3f} ±{self.spread:5.3f}"


def summary(samples: list[float]) -> Time:
    quarters = statistics.quantiles(samples, n=4)
    return Time(statistics.median(samples), (quarters[2] - quarters[0]) / 2)


def graph_time(call: Callable[[], object], replays: int = 9) -> Time:
    """GPU time of a call, from a graph of as many calls as take some 5 ms."""
    return summary(graph_turns([call], replays)[0])


def graph_turns(calls: list[Callable[[], object]], turns: int = 9) -> list[list[float]]:
    """GPU milliseconds of several calls in each of the turns that their graphs take, the first of which does not count.

    What drifts or passes, such as clocks, all of them see alike: the ratio of two in one turn spreads less than either.
    """
    graphs = [record(call) for call in calls]
    time.sleep(CLEARING_SECONDS)
    times = [[once(graph.replay) / count for graph, count in graphs] for _ in range(1 + turns)]
    return [list(of_one) for of_one in zip(*times[1:], strict=True)]


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Their time over ours, turn by turn: the median and half the width of the middle half."""
    found = summary([b / a for a, b in zip(ours, theirs, strict=True)])
    return f"{found.median:5.3f}x ±{found.spread:5.3f}"


def record(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some calls, replayed once, and how many they are."""
    torch.cuda.synchronize()  # the other stream does not wait for the inputs
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    calls = max(1, min(20, round(5 / max(once(call), 0.05))))
    torch.cuda.empty_cache()  # the graph has a pool of memory of its own, and what a large call took must fit twice
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    return graph, calls


def once(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def eager_time(call: Callable[[], object], calls: int = 10) -> float:
    """Wall time of a call when many follow each other, the median of a few times that: hosts do other things, too."""

    def mean() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    call()
    return statistics.median(mean() for _ in range(5))


def make_inputs(batch: int, length: int, channels: int, states: int) -> dict[str, Tensor]:
    """Inputs as a freshly initialised model has them: Δ between 0.001 and 0.1, A = -1, -2, ..."""

    def activation(width: int) -> Tensor:
        return torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)

    delta = torch.exp(torch.empty(channels, device="cuda").uniform_(-6.9, -2.3))
    return {
        "x": activation(channels),
        "dt": 0.1 * activation(channels),
        "A": -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1),
        "B": activation(states),
        "C": activation(states),
        "D": torch.ones(channels, device="cuda"),
        "z": activation(channels),
        "dt_bias": delta + torch.log(-torch.expm1(-delta)),
    }


def calls(
    operator: Callable[..., Tensor], arguments: list[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward alone, and forward with backward."""
    arguments = [a.detach().requires_grad_() for a in arguments]
    grad = torch.randn_like(arguments[0])

    def forward() -> object:
        with torch.no_grad():
            return operator(*arguments)

    return forward, lambda: torch.autograd.grad(operator(*arguments), arguments, grad)


def peer() -> Callable[..., Tensor]:
    import selective_scan_cuda
    from mamba_ssm.ops import selective_scan_interface

    assert selective_scan_interface.selective_scan_cuda is selective_scan_cuda, "mamba_ssm lacks its CUDA extension"

    def operator(*arguments: Tensor) -> Tensor:
        return selective_scan_interface.selective_scan_fn(*arguments, delta_softplus=True)

    return operator


def row(batch: int, length: int, channels: int, states: int, official: Callable[..., Tensor], copy_rate: float) -> str:
    inputs = make_inputs(batch, length, channels, states)
    transposed = {k: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for k, v in inputs.items()}
    ours_forward, ours_both = calls(selective_scan, list(inputs.values()))
    peer_forward, peer_both = calls(official, list(transposed.values()))
    times = [graph_time(call) for call in (ours_forward, peer_forward, ours_both, peer_both)]
    eager = [eager_time(call) for call in (ours_both, peer_both)]
    activation = 2 * batch * length * channels
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    exponentials = 1e3 * batch * length * channels * states
    exponentials /= EXPONENTIALS_PER_CLOCK * processors * 1e6 * max_clock_mhz()
    forward_bytes, both_bytes = (1e3 * n * activation / copy_rate for n in (4, 11))
    forward_ratio, both_ratio = times[1].median / times[0].median, times[3].median / times[2].median
    return (
        f"{batch:3d} {length:6d} {channels:5d} {states:3d} | {times[0]} {times[1]} {forward_ratio:5.2f}x"
        f" {forward_bytes:6.3f} {exponentials:6.3f} | {times[2]} {times[3]} {both_ratio:5.2f}x"
        f" {both_bytes:6.3f} {3 * exponentials:6.3f} | {eager[0]:8.3f} {eager[1]:8.3f}"
    )


@functools.cache
def max_clock_mhz() -> float:
    return float(ask_device("clocks.max.sm").split()[0])


def ask_device(query: str) -> str:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copy_bytes_per_second() -> float:
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / graph_time(lambda: target.copy_(source)).median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    arguments = parser.parse_args()
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; bf16, with D, z, Δ bias and softplus")
    official, rate = peer(), copy_bytes_per_second()
    print(f"copy {rate / 1e12:.2f} TB/s; times in ms; SM clock just after the copies: {ask_device('clocks.sm')}")
    print("floors: 'bytes' = every activation and gradient once at the copy rate; 'exp' = one ex2 per state element")
    print("forward, and three in forward + backward (which computes the states of a step twice)")
    print(
        "  b      l     d   n |   forward: ours           mamba_ssm  ratio  bytes    exp"
        " | forward + backward: ours mamba_ssm  ratio  bytes    exp | eager f+b: ours, mamba_ssm"
    )
    for shape in (shape for name in arguments.rows for shape in ROWS[name]):
        print(row(*shape, official, rate), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
