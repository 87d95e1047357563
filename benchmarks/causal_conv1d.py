"""The causal convolution beside the official one, with the floor that bytes set.

    python -m benchmarks.causal_conv1d [--quick | --sweep]

One process, one GPU: each row times the same inputs, channel last, bf16, with bias and SiLU. GPU times are medians over
replays of CUDA graphs of several calls, which take turns, with the middle half's spread; the ratio, the official time
over ours, is taken turn by turn. Eager times are what a user sees who calls it from Python.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.selective_scan import (
    ask_device,
    calls,
    copy_bytes_per_second,
    eager_time,
    graph_time,
    graph_turns,
    ratio,
    summary,
)
from kernels.causal_conv1d import causal_conv1d, launch

ROWS = [(8, 2048, 5120), (1, 131072, 5376), (8, 2048, 5376), (8, 2048, 1536), (8, 2048, 4096), (1, 2048, 5120)]
SMALL = [(1, 150, 3000), (1, 501, 4800), (8, 1256, 288), (2, 1892, 1072)]  # swept besides
WIDTH = 4
SHAPES = {  # tried in a sweep
    "forward": [
        *(
            launch.Shape(block, warps, 8, 8, stretches)
            for block, warps, stretches in [(128, 4, 4), (128, 2, 2), (256, 4, 2)]
        ),
        *(launch.Shape(128, 4, steps, steps, 4) for steps in (4, 16)),
    ],
    "backward": [
        *(launch.Shape(64, 4, steps, steps, 4) for steps in (16, 20, 24)),
        *(launch.Shape(128, stretches, 16, 16, stretches) for stretches in (2, 4)),
        *(launch.Shape(128, 1, 4, steps) for steps in (16, 20, 24, 32, 44, 64, 100, 132, 164, 192, 256)),
    ],
}
FORWARD_TENSORS, BOTH_TENSORS = 2, 5  # that must be read or written once: x, y; and x, dy, dx


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")


def official(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def row(batch: int, length: int, channels: int, copy_rate: float) -> str:
    x = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)
    inputs = [x, torch.randn(channels, WIDTH, device="cuda"), torch.randn(channels, device="cuda")]
    pairs = [calls(operator, inputs) for operator in (ours, official)]
    floors = [1e3 * count * x.nbytes / copy_rate for count in (FORWARD_TENSORS, BOTH_TENSORS)]
    text = f"{batch:3d} {length:6d} {channels:5d}"
    for part, floor in enumerate(floors):
        turns = graph_turns([pair[part] for pair in pairs])
        time, of_peer = (summary(samples) for samples in turns)
        text += f" | {time} {of_peer} {ratio(turns[1], turns[0])} {floor:6.3f} {time.median / floor:5.2f}x"
    return text + " | " + " ".join(f"{eager_time(pair[1]):8.3f}" for pair in pairs)


def sweep(shape: tuple[int, int, int], best: int = 6) -> None:
    """Forward and backward alone, with other launch shapes: the best few and their milliseconds."""
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    weight, bias, grad = torch.randn(shape[2], WIDTH, device="cuda"), torch.randn(shape[2], device="cuda"), x.clone()
    chosen = launch.FORWARD, launch.backward_shape
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: launch.forward(x, weight, bias, True, None, None),
        "backward": lambda: launch.backward(grad, None, x, weight, bias, True, None, None),
    }
    for name, call in passes.items():
        times = []
        for candidate in SHAPES[name]:
            launch.FORWARD, launch.backward_shape = candidate, lambda *_, candidate=candidate: candidate
            times.append((graph_time(call, replays=3).median, tuple(candidate)))
        print(shape, name, "; ".join(f"{time:.4f} {candidate}" for time, candidate in sorted(times)[:best]), flush=True)
    launch.FORWARD, launch.backward_shape = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the table's rows")
    parser.add_argument("--sweep", action="store_true", help="launch shapes instead")
    arguments = parser.parse_args()
    quick = arguments.quick
    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    if arguments.sweep:
        for shape in ROWS + SMALL:
            sweep(shape)
        return
    import causal_conv1d as peer

    rate = copy_bytes_per_second()
    print(f"torch {torch.__version__}, causal-conv1d {peer.__version__}; bf16, width {WIDTH}, bias, SiLU, channel last")
    print(f"copy {rate / 1e12:.2f} TB/s; times in ms; floor: every activation and gradient once at that rate")
    print(
        "  b      l     d | forward: ours, official, ratio, floor, ours / floor"
        " | the same of forward + backward | eager forward + backward: ours, official"
    )
    rows = list(ROWS)
    if not quick:
        for _ in range(5):
            rows.append((random.choice([1, 2, 3, 5, 8]), random.randint(100, 4096), 8 * random.randint(32, 640)))
    for shape in rows:
        print(row(*shape, rate), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
