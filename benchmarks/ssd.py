"""SSD of Mamba-2 beside mamba_ssm's, with the floor that bytes set.

    python -m benchmarks.ssd [--quick | --sweep | --kernels] [--seed 0]

One process, one GPU: each row times ours and the peer on the same inputs; the peer is autotuned on the first row, and
--seed draws the five random shapes. GPU times are medians over replays of a CUDA graph of several calls, with the
middle half's spread; eager times are what a user sees who calls it from Python: one call with its backward, which
pays alone for autograd's change of threads, and several calls in a row with one backward, as a model's layers are.
Bytes: x and y once for the forward; x, dy and dx for the backward; B, C and dt.

--kernels prints what each of our kernels takes; --sweep does so for other launch shapes than those of the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from benchmarks.selective_scan import ask_device, calls, copy_bytes_per_second, eager_time, graph_time
from kernels.ssd import launch, ssd

ROWS = [
    *((8, 2048, 5120), (8, 2048, 4096), (4, 8192, 5120)),
    *((1, 32768, 5120), (1, 131072, 5120), (8, 2048, 1536)),
]
HEAD_DIM, STATES = 64, 128
LAYERS = 8
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
S = launch.Shape
SWEEP = {
    "FORWARD": [
        *(S(64, 64, 128, 4, stages) for stages in (1, 2, 3)),
        *(S(64, 32, 128, 4, stages) for stages in (2, 3)),
        *(S(128, 64, 128, 8, stages) for stages in (1, 2)),
        *(S(128, 32, 128, 8, 2), S(64, 64, 128, 8, 2)),
    ],
    "STATES": [
        *(S(64, 64, 128, 4, stages) for stages in (2, 3, 4)),
        *(S(64, 64, 64, 4, stages) for stages in (2, 3, 4)),
        *(S(64, 32, 64, 4, 3), S(64, 64, 128, 8, 3), S(64, 32, 128, 4, 3)),
    ],
    "GRADIENTS": [*(S(64, 128, 128, 8, stages) for stages in (1, 2, 3)), *(S(64, 128, 128, 4, n) for n in (1, 2))],
    "FLOWS": [S(chunk, 128, 128, warps, stages) for chunk in (64, 128) for warps in (4, 8) for stages in (1, 2)],
}


def make_inputs(batch: int, length: int, channels: int) -> dict[str, Tensor]:
    """Inputs as a freshly initialised model has them: Δ between 0.001 and 0.1, A between -1 and -16."""
    heads = channels // HEAD_DIM

    def activation(*width: int) -> Tensor:
        return torch.randn(batch, length, *width, device="cuda", dtype=torch.bfloat16)

    delta = torch.exp(torch.empty(heads, device="cuda").uniform_(-6.9, -2.3))
    return {
        "x": activation(heads, HEAD_DIM),
        "dt": 0.1 * activation(heads),
        "A": -torch.empty(heads, device="cuda").uniform_(1, 16),
        "B": activation(1, STATES),
        "C": activation(1, STATES),
        "D": torch.ones(heads, device="cuda"),
        "dt_bias": delta + torch.log(-torch.expm1(-delta)),
    }


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    return ssd(x, dt, A, B, C, D, dt_bias=dt_bias)


def layers(x: Tensor, *others: Tensor) -> Callable[[], object]:
    """Forward and backward of `LAYERS` calls of ours in a row, each with parameters and dt, B, C of its own."""
    leaves = [[t.clone().requires_grad_() for t in others] for _ in range(LAYERS)]
    grad = torch.randn_like(x)

    def both() -> object:
        y = x
        for own in leaves:
            y = ours(y, *own)
        return torch.autograd.grad(y, [x, *(leaf for own in leaves for leaf in own)], grad)

    return both


def peer() -> Callable[..., Tensor]:
    """mamba_ssm's operator, which tries some 200 launch shapes at its first call: each for 20 ms instead of 125."""
    import triton.testing
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    triton.testing.do_bench.__defaults__ = (5, 15, *triton.testing.do_bench.__defaults__[2:])

    def operator(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)

    return operator


def random_rows(seed: int) -> list[tuple[int, int, int]]:
    draw = random.Random(seed)
    return [(draw.choice([1, 2, 3, 5, 8]), draw.randint(100, 4096), HEAD_DIM * draw.randint(8, 80)) for _ in range(5)]


def row(batch: int, length: int, channels: int, official: Callable[..., Tensor], copy_rate: float) -> str:
    inputs = make_inputs(batch, length, channels)
    arguments = [inputs[name] for name in NAMES]
    (our_forward, our_both), (peer_forward, peer_both) = calls(ours, arguments), calls(official, arguments)
    times = [graph_time(call) for call in (our_forward, peer_forward, our_both, peer_both)]
    eager = [eager_time(call) for call in (our_both, peer_both)]
    small = inputs["B"].nbytes + inputs["C"].nbytes + inputs["dt"].nbytes
    floors = [1e3 * (n * inputs["x"].nbytes + m * small) / copy_rate for n, m in ((2, 1), (5, 3))]
    text = f"{batch:3d} {length:6d} {channels:5d}"
    for part, floor in enumerate(floors):
        mine, theirs = times[2 * part : 2 * part + 2]
        text += f" | {mine} {theirs} {theirs.median / mine.median:5.2f}x {floor:6.3f}"
    in_a_row = eager_time(layers(*[t.detach().requires_grad_() for t in arguments]), calls=3) / LAYERS
    ratios = [f"{time:8.3f} {time / times[2].median:5.2f}x" for time in (eager[0], in_a_row)]
    return text + f" | {ratios[0]} {eager[1]:8.3f} | {ratios[1]}"


def kernel_times(call: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Microseconds of each kernel in a call, by the profiler: medians of what a call adds up to."""
    call()
    found = defaultdict(list)
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        for event in profile.key_averages():
            found[event.key].append(event.self_device_time_total)
    return {name: statistics.median(times) for name, times in found.items()}


def print_kernels(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(*shape)
    times = kernel_times(calls(ours, [inputs[name] for name in NAMES])[1])
    print(*shape, f"{sum(times.values()) / 1e3:.3f} ms:", flush=True)
    for name, time in sorted(times.items(), key=lambda pair: -pair[1]):
        print(f"{time:9.1f} us  {name[:100]}", flush=True)


def compile_shape(table: str, shape: launch.Shape) -> None:
    """Compile the kernels with another launch shape; the next process finds them on disk."""
    setattr(launch, table, shape)
    inputs = make_inputs(1, 256, 4 * HEAD_DIM)
    calls(ours, [inputs[name] for name in NAMES])[1]()


def sweep(shapes: list[tuple[int, int, int]]) -> None:
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_shape, table, shape) for table, found in SWEEP.items() for shape in found]
        for job in jobs:
            job.exception()  # shown below
    for shape in shapes:
        inputs = make_inputs(*shape)
        both = calls(ours, [inputs[name] for name in NAMES])[1]
        for table, found in SWEEP.items():
            usual = getattr(launch, table)
            for other in found:
                setattr(launch, table, other)
                try:
                    times = kernel_times(both)
                    mine = {n: t for n, t in times.items() if n.startswith(table.lower())}
                    shown = f"{sum(mine.values()):9.1f} us"
                except Exception as error:
                    shown = " ".join(str(error).split())[:120]
                print(*shape, table, tuple(other), shown, flush=True)
            setattr(launch, table, usual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the table's rows")
    parser.add_argument("--sweep", action="store_true", help="other launch shapes, on the first row and the fourth")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.add_argument("--kernels", action="store_true", help="what each kernel takes, on all rows")
    options = parser.parse_args()
    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    if options.sweep:
        return sweep([ROWS[0], ROWS[3]])
    if options.kernels:
        for shape in ROWS:
            print_kernels(shape)
        return
    import mamba_ssm

    official, rate = peer(), copy_bytes_per_second()
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; bf16, with D, Δ bias and softplus;", end=" ")
    print(f"heads of {HEAD_DIM}, {STATES} states, 1 group")
    print(f"copy {rate / 1e12:.2f} TB/s; times in ms; floor: bytes that must move at that rate")
    print("forward, then forward + backward: ours, mamba_ssm, ratio, floor;", end=" ")
    print(f"then eager f+b: ours, ours / GPU time, mamba_ssm; ours of {LAYERS} in a row, each, that / GPU time")
    print("  b      l     d")
    rows = list(ROWS)
    if not options.quick:
        rows += random_rows(options.seed)
    for shape in rows:
        print(row(*shape, official, rate), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
