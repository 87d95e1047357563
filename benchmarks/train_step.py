"""Whole training steps beside `mamba_ssm`'s `MambaLMHeadModel`: tokens per second, memory, MFU, time by kernel.

    python -m benchmarks.train_step [--models mamba_130m mamba_370m] [--steps 8] [--kernels ours]
    python -m benchmarks.train_step --models mamba_370m --micro-batches 1 2 4 16 [--global-batch 16]

One process, one GPU; benchmarks/step_models.py says what a step is. Without --micro-batches each runs at the one that
served it best (`BEST`), the peer at three quarters of that where it does not fit. With --global-batch a step is so many
sequences, in micro-batches. --recompute says which values of engine.recompute ours runs with; "auto", the default here
and of train.py, is what fits, and shown as such: "scan 16/48" are 16 of 48 layers, which "scan:16" asks for. A rate is
the median over the steps after the warm-up, with quartiles, from events on the GPU: nothing waits between two steps but
what the step itself waits for. The peak is torch's allocator's. MFU = 6 × parameters of the matrices × tokens/s over
the rate of a bf16 product of 8192³, measured first. --kernels adds the GPU time of a step by kind of kernel, in ms, and
the longest ones.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
    """What is measured: sequences per micro-batch, micro-batches per step, tokens per sequence, steps."""

    rows: int
    micro_batches: int
    length: int
    steps: int

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


def measure(name: str, step: Step, run: Run, flops: float, peak: float, kernels: bool) -> float:
    """Print a row and return its median rate."""
    torch.cuda.reset_peak_memory_stats()
    low, median, high = statistics.quantiles(rates(step, run), n=4)
    memory = torch.cuda.max_memory_allocated() / 2**30
    sizes = f"{run.rows:3d}" + (f" x {run.micro_batches}" if run.micro_batches > 1 else "")
    print(
        f"  {name:15s} {sizes:7s} {median:9,.0f} ({low:,.0f} to {high:,.0f}) tokens/s, {1e3 * run.tokens / median:.1f} "
        f"ms, {memory:.1f} GiB, MFU {flops * median / peak:.3f}",
        end="",
        flush=True,
    )
    if kernels:
        data = run.batches()
        times = kernel_times(lambda: step(data), PROFILED)
        print()
        print_kernels(times, 1e3 * run.tokens / median)
    return median


def attempt(name: str, make: Callable[[], Step], run: Run, flops: float, peak: float, kernels: bool) -> float | None:
    """`measure` what `make` returns, or a line that says that memory ran out, be it while that was made."""
    try:
        return measure(name, make(), run, flops, peak, kernels)
    except torch.OutOfMemoryError:
        print(f"  {name:15s} {run.rows:3d} out of memory", end="", flush=True)
        return None
    finally:
        clean()


def warmed_up_peer(config: ModelConfig, rows: int, length: int) -> Step:
    """It looks for launch shapes at its first step, which takes memory of its own: half as many sequences."""
    step = peer(config)
    step(Run(max(1, rows // 2), 1, length, 1).batches())
    clean()
    return step


def matrix_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a training step per token, of the products with weights alone."""
    parts = flops_per_token(config, length)
    return 3.0 * (parts.in_proj + parts.x_proj + parts.dt_proj + parts.out_proj + parts.mlp + parts.head)


def matrix_rate() -> float:
    """FLOP/s of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * 8192**3 / graph_time(lambda: a @ b).median


def table(name: str, arguments: argparse.Namespace, peak: float) -> None:
    config = model_config(name, arguments.layers)
    flops = matrix_flops(config, arguments.length)
    print(f"{name}, sequences of {arguments.length} tokens", flush=True)

    def run(rows: int) -> Run:
        whole = arguments.global_batch or rows
        return Run(rows, max(1, whole // rows), arguments.length, arguments.steps)

    best_of_ours = 0.0
    for rows in arguments.micro_batches or [BEST[name]]:
        for recompute, layers in arguments.recompute:
            graphs = False if arguments.no_graphs else None
            settings = engine_config(config, recompute, graphs, rows, arguments.length)
            settings.recompute_layers = layers or settings.recompute_layers
            label = f"ours {settings.recompute}"
            if settings.recompute_layers:
                label += f" {settings.recompute_layers}/{config.n_layer}"
            make = partial(ours, config, settings)
            found = attempt(label, make, run(rows), flops, peak, arguments.kernels is not None)
            best_of_ours = max(best_of_ours, found or 0.0)
            print(flush=True)
    if arguments.no_peer:
        return
    for rows in arguments.micro_batches or [BEST[name], 3 * BEST[name] // 4]:
        make = partial(warmed_up_peer, config, rows, arguments.length)
        found = attempt("mamba_ssm", make, run(rows), flops, peak, arguments.kernels == "both")
        print(f"; our best is {best_of_ours / found:.2f} times that" if found and best_of_ours else "", flush=True)
        if found and not arguments.micro_batches:
            break


def policy(text: str) -> tuple[Recompute, int | None]:
    """engine.recompute and engine.recompute_layers."""
    kind, _, layers = text.partition(":")
    return Recompute(kind), int(layers) if layers else None


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(BEST), choices=list(BEST))
    parser.add_argument("--micro-batches", type=int, nargs="*", help="sequences, of both; default: the best of each")
    parser.add_argument("--global-batch", type=int, help="sequences of a step; default: one micro-batch")
    parser.add_argument("--recompute", nargs="*", default=[policy("auto")], type=policy, metavar="POLICY[:LAYERS]")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="of the model, to try this out or to fill the compilers' caches")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-graphs", action="store_true", help="ours with engine.cuda_graphs=false")
    parser.add_argument("--kernels", choices=["ours", "both"])
    arguments = parser.parse_args()
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm"))
    peak = matrix_rate()
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; bf16 product {peak / 1e12:.0f} TFLOP/s")
    for name in arguments.models:
        table(name, arguments, peak)


if __name__ == "__main__":
    main()
