"""Whole training steps beside `mamba_ssm`'s `MambaLMHeadModel`: tokens per second, memory, MFU, time by kernel.

    python -m benchmarks.train_step [--models mamba_130m mamba_370m] [--steps 8] [--kernels ours]
    python -m benchmarks.train_step --models mamba_370m --micro-batches 1 2 4 16 [--global-batch 16]

One GPU; benchmarks/step_models.py says what a step is. Each row has a process of its own, so that none finds memory
that another has left in pieces; all import what they need at the start, and then wait for their turn. Without
--micro-batches each runs at the one that served it best (`BEST`). With --global-batch a step is so many sequences, in
micro-batches. --recompute says which values of engine.recompute ours runs with; "auto", the default here and of
train.py, is what fits, and shown as such: "scan 16/48" are 16 of 48 layers. A rate is the median over the steps after
the warm-up, with quartiles, from events on the GPU: nothing waits between two steps but what the step itself waits for.
The peak is torch's allocator's. MFU = 6 × parameters of the matrices × tokens/s over the rate of a bf16 product of
8192³, measured first. --kernels adds the GPU time of a step by kind of kernel, in ms, and the longest kernels.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks.selective_scan import ask_device, graph_time
from benchmarks.step_kernels import kernel_times, print_kernels
from benchmarks.step_models import VOCABULARY, Batches, Step, engine_config, model_config, ours, peer
from mamba_train.config import ModelConfig, Recompute
from mamba_train.monitor.flops import flops_per_token

# Sequences of 2,048 tokens: the micro-batches that served both best in 80 GB, of those that fit.
BEST = {"mamba_130m": 32, "mamba_370m": 16, "mamba_1.4b": 8, "mamba2_130m": 32, "mamba2_1.3b": 8}
WARM_UP = 4  # compiled, recorded, the update recorded, and once more
PROFILED = 2  # steps


@dataclass
class Run:
    """What is measured.

    policy: of ours, None for the peer. rows: sequences per micro-batch. length: tokens per sequence. layers: of the
    model, None for as many as it has. kernels: whether to show them.
    """

    model: str
    policy: str | None
    rows: int
    micro_batches: int
    length: int
    steps: int
    layers: int | None
    graphs: bool | None
    kernels: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.micro_batches * self.length

    def batches(self) -> Batches:
        return [
            torch.randint(0, VOCABULARY, (self.rows, self.length + 1)).pin_memory() for _ in range(self.micro_batches)
        ]


def rates(step: Step, run: Run) -> list[float]:
    """Tokens per second of each step."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(run.steps + 1)]
    data = [run.batches() for _ in range(3)]
    for number in range(WARM_UP):
        step(data[number % 3])
    events[0].record()
    for number, event in enumerate(events[1:]):
        step(data[number % 3])
        event.record()
    torch.cuda.synchronize()
    return [1e3 * run.tokens / before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def measure(run: Run, peak: float) -> float | None:
    """Print a row and return its median rate, None where memory ran out."""
    config = model_config(run.model, run.layers)
    sizes = f"{run.rows:3d}" + (f" x {run.micro_batches}" if run.micro_batches > 1 else "")
    try:
        if run.policy is None:
            name, step = "mamba_ssm", peer(config)
        else:
            settings = engine_config(config, Recompute(run.policy), run.graphs, run.rows, run.length)
            name, step = f"ours {settings.recompute}", ours(config, settings)
            if settings.recompute_layers:
                name += f" {settings.recompute_layers}/{config.n_layer}"
        low, median, high = statistics.quantiles(rates(step, run), n=4)
    except torch.OutOfMemoryError:
        print(f"  {run.policy or 'mamba_ssm':15s} {sizes:7s} out of memory", flush=True)
        return None
    memory = torch.cuda.max_memory_allocated() / 2**30
    mfu = matrix_flops(config, run.length) * median / peak
    print(
        f"  {name:15s} {sizes:7s} {median:9,.0f} ({low:,.0f} to {high:,.0f}) tokens/s, {1e3 * run.tokens / median:.1f} "
        f"ms, {memory:.1f} GiB, MFU {mfu:.3f}",
        flush=True,
    )
    if run.kernels:
        data = run.batches()
        print_kernels(kernel_times(lambda: step(data), PROFILED), 1e3 * run.tokens / median)
    return median


def matrix_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a training step per token, of the products with weights alone."""
    parts = flops_per_token(config, length)
    return 3.0 * (parts.in_proj + parts.x_proj + parts.dt_proj + parts.out_proj + parts.mlp + parts.head)


def matrix_rate() -> float:
    """FLOP/s of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * 8192**3 / graph_time(lambda: a @ b).median


def work(run: Run | None, turn: Connection) -> None:
    """A process: the rate of a matrix product, or of a run."""
    import mamba_ssm  # noqa: F401  while others have their turn

    peak = turn.recv()
    turn.send(matrix_rate() if run is None else measure(run, peak))


class Turns:
    """Processes that measure one after the other."""

    def __init__(self, runs: list[Run]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections = []
        for run in (None, *runs):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(run, there), daemon=True)
            process.start()
            there.close()
            self._connections.append((process, here))

    def next(self, peak: float | None) -> float | None:
        process, connection = self._connections.pop(0)
        try:
            connection.send(peak)
            found = connection.recv()
        except (EOFError, BrokenPipeError):  # it has said why
            found = None
        process.join()
        return found


def runs_of(name: str, arguments: argparse.Namespace) -> list[Run]:
    """Ours first."""
    policies = [*arguments.recompute, *([] if arguments.no_peer else [None])]
    return [
        Run(
            model=name,
            policy=policy,
            rows=rows,
            micro_batches=max(1, (arguments.global_batch or rows) // rows),
            length=arguments.length,
            steps=arguments.steps,
            layers=arguments.layers,
            graphs=False if arguments.no_graphs else None,
            kernels=arguments.kernels is not None and (policy is not None or arguments.kernels == "both"),
        )
        for policy in policies
        for rows in arguments.micro_batches or [BEST[name]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(BEST), choices=list(BEST))
    parser.add_argument("--micro-batches", type=int, nargs="*", help="sequences, of both; default: the best of each")
    parser.add_argument("--global-batch", type=int, help="sequences of a step; default: one micro-batch")
    parser.add_argument("--recompute", nargs="*", default=["auto"], choices=[policy.value for policy in Recompute])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="of the model, to try this out or to fill the compilers' caches")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-graphs", action="store_true", help="ours with engine.cuda_graphs=false")
    parser.add_argument("--kernels", choices=["ours", "both"])
    arguments = parser.parse_args()
    runs = [run for name in arguments.models for run in runs_of(name, arguments)]
    turns = Turns(runs)
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm"))
    peak = turns.next(None)
    assert peak is not None
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; bf16 product {peak / 1e12:.0f} TFLOP/s")
    for name, group in itertools.groupby(runs, key=lambda run: run.model):
        print(f"{name}, sequences of {arguments.length} tokens", flush=True)
        found = [(run.policy is not None, turns.next(peak) or 0.0) for run in group]
        of_ours, of_peer = (
            max((rate for is_ours, rate in found if is_ours == side), default=0.0) for side in (True, False)
        )
        if of_ours and of_peer:
            print(f"  our best is {of_ours / of_peer:.2f} times the peer's", flush=True)


if __name__ == "__main__":
    main()
