"""Several GPUs beside one of them: tokens per second of whole training steps, and how much of n times is left.

    torchrun --nproc-per-node 2 --master-addr localhost -m benchmarks.data_parallel \
      [--model mamba_1.4b] [--rows 8 16] [--engines single fsdp ddp] [--steps 12]

Each engine runs on all GPUs, one process each; "single" is the same step on every GPU by itself, at the same time and
without a word between them, so that it has the same host and the same heat; the share that is printed is of the sum of
the rates that the GPUs have alone. With one process it says what an engine costs where there is nobody to speak with.
Medians of the steps after the warm-up, by events on each GPU, with quartiles (of the first GPU).

"-kept" is engine.reshard_after_forward=false, "-eager" engine.cuda_graphs=false, "-bf16" engine.reduce_precision=bf16.
The others have graphs, as a run has by default, but not with engine=fsdp and several micro-batches to a step.
What is under way goes to stderr, with the seconds since the process began: a run that is cut off says where its time
went.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.step_kernels import kernel_times, print_kernels
from benchmarks.step_models import LEARNING_RATE, MAX_NORM, VOCABULARY, draw_on_device, model_config
from mamba_train.config import EngineConfig, EngineKind, ModelConfig, OptimConfig, Precision, Recompute
from mamba_train.parallel import native
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine, only_finite
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import Ranks, join, leave

WARM_UP = 4
FSDP = {"name": EngineKind.fsdp, "reshard_after_forward": True}
KEPT = {"name": EngineKind.fsdp, "reshard_after_forward": False}
ENGINES: dict[str, dict[str, object]] = {
    "single": {},
    "single-eager": {"cuda_graphs": False},
    "fsdp": FSDP,
    "fsdp-eager": {**FSDP, "cuda_graphs": False},
    "fsdp-kept": KEPT,
    "fsdp-kept-eager": {**KEPT, "cuda_graphs": False},
    "fsdp-kept-bf16": {**KEPT, "reduce_precision": Precision.bf16},
    "ddp": {"name": EngineKind.ddp},
    "ddp-eager": {"name": EngineKind.ddp, "cuda_graphs": False},
}


class Alone(Ranks):
    """A process that counts itself as the only one, on a GPU of its own."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks, ranks.store)  # type: ignore[arg-type]
        self.rank, self.world_size = 0, 1


def note(text: str) -> None:
    """A line on stderr of the first process, with the seconds since it began (Linux)."""
    if int(os.environ.get("RANK", 0)) == 0:
        begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        print(f"[{time.clock_gettime(time.CLOCK_BOOTTIME) - begun:6.1f} s] {text}", file=sys.stderr, flush=True)


def make(name: str, model: ModelConfig, recompute: Recompute, ranks: Ranks) -> Engine:
    config = EngineConfig(recompute=recompute, **ENGINES[name])  # type: ignore[arg-type]
    engine = NativeEngine(config, Alone(ranks)) if name.startswith("single") else build_engine(config, ranks)
    engine.prepare(model, OptimConfig(lr=LEARNING_RATE, max_grad_norm=MAX_NORM), seed=0)
    torch.cuda.synchronize()
    note(f"{name}: made")
    return engine


class Steps:
    """Whole steps of an engine; `launching`: the seconds that Python has launched passes instead of waiting."""

    def __init__(self, engine: Engine, rows: int, micro_batches: int, length: int) -> None:
        self._engine = engine
        self._batches = [torch.randint(0, VOCABULARY, (rows, length + 1)).pin_memory()] * micro_batches
        n_targets = rows * length * micro_batches * engine.world_size
        self._n_targets = torch.tensor(float(n_targets), device=engine.device)
        self.launching = 0.0

    def __call__(self) -> None:
        begin = time.perf_counter()
        for batch in self._engine.micro_batches(self._batches):
            moved = batch.to(self._engine.device, non_blocking=True)
            self._engine.accumulate(moved[:, :-1], moved[:, 1:], None, self._n_targets)
        self.launching += time.perf_counter() - begin
        self._engine.step(LEARNING_RATE, only_finite(self._engine))


def measure(step: Steps, n_steps: int) -> tuple[list[float], float]:
    """Milliseconds of each step; share of the time in which Python launched a pass instead of waiting."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n_steps + 1)]
    for number in range(WARM_UP + n_steps):
        step()
        if number < WARM_UP:
            step.launching = 0.0
            note(f"  step {number + 1}, which is not measured")
        if number >= WARM_UP - 1:
            events[number - WARM_UP + 1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return times, 1e3 * step.launching / sum(times)


def compare(args: argparse.Namespace, model_name: str, rows: int, ranks: Ranks) -> None:
    """All engines with one model and number of rows, a line each."""
    model = model_config(model_name, args.layers)
    if ranks.rank == 0:
        print(f"{model_name}, {model.n_layer} layers, {args.micro_batches} x {rows} x {args.length} tokens on each GPU")
    alone = 0.0  # tokens per second of all GPUs, each by itself
    for name in args.engines:
        torch.cuda.reset_peak_memory_stats()
        engine = make(name, model, Recompute(args.recompute), ranks)
        step = Steps(engine, rows, args.micro_batches, args.length)
        times, launching = measure(step, args.steps)
        memory = torch.cuda.max_memory_allocated() / 2**30
        kernels = kernel_times(step, 2) if args.kernels else {}
        del engine, step
        gc.collect()
        torch.cuda.empty_cache()
        if ranks.world_size > 1:
            dist.barrier()
        low, median, high = statistics.quantiles(times, n=4)
        rates = of_each(1e3 * args.micro_batches * rows * args.length / median, ranks)
        if name.startswith("single"):
            alone = alone or sum(rates)
            rate, more = rates[0], f", each GPU: {' '.join(f'{each:,.0f}' for each in rates)}"
        else:
            rate = ranks.world_size * rates[0]
            more = f", {rate / alone:.3f} of {ranks.world_size} alone" if alone else ""
        if ranks.rank == 0:
            print(
                f"  {name:16s} {rate:9,.0f} tokens/s, {median:.1f} ms a step ({low:.1f} to {high:.1f}), "
                f"{memory:.1f} GiB, Python busy {100 * launching:.0f}%{more}",
                flush=True,
            )
            if kernels:
                print_kernels(kernels, median)


def of_each(value: float, ranks: Ranks) -> list[float]:
    """The values of all ranks."""
    row = torch.zeros(ranks.world_size, dtype=torch.float64)
    row[ranks.rank] = value
    values: list[float] = ranks.sum(row).tolist()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["mamba_1.4b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8], help="sequences of a micro-batch on each GPU")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--kernels", action="store_true", help="the GPU time of a step by kernel, too, of the first GPU"
    )
    parser.add_argument("--recompute", default="scan", choices=[policy.value for policy in Recompute])
    parser.add_argument("--engines", nargs="*", default=["single", "fsdp", "ddp"], choices=list(ENGINES))
    args = parser.parse_args()
    note("imported")
    ranks = join()
    native.draw_pieces = draw_on_device
    if ranks.rank == 0:
        print(
            f"{ranks.world_size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, "
            f"engine.recompute={args.recompute}",
            flush=True,
        )
    for model_name, rows in itertools.product(args.model, args.rows):
        compare(args, model_name, rows, ranks)
    leave()


if __name__ == "__main__":
    main()
