"""The reference selective scan on the CPU beside a loop over steps that autograd differentiates.

    python benchmarks/reference_scan_cpu.py [--threads 4] [--repeats 9]

Prints the median and the range of the milliseconds of a forward and of a backward, and the tokens per second of both
together, in fp32, for shapes (batch, length, channel, state). The loop's rounds alternate with ours. On Linux most of
what is left goes to fresh pages for large tensors: try it with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set
to 4294967296.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels.selective_scan import selective_scan

SHAPES = [(8, 256, 256, 16), (16, 128, 256, 16), (32, 128, 256, 16), (16, 256, 256, 8)]


def step_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan as one would write it first: a few operations for each step, the backward left to autograd."""
    delta = F.softplus(dt + dt_bias)
    # unbind, because the gradient of indexing one step is a tensor of all steps.
    decays = torch.exp(delta.unsqueeze(-1) * A).unbind(1)
    driven = ((delta * x).unsqueeze(-1) * B.unsqueeze(2)).unbind(1)
    state = torch.zeros_like(driven[0])
    ys = []
    for decay, drive, c in zip(decays, driven, C.unsqueeze(-1).unbind(1), strict=True):
        state = decay * state + drive
        ys.append((state @ c).squeeze(-1))
    return (torch.stack(ys, dim=1) + D * x) * F.silu(z)


def draw(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    """Inputs like those of a fresh model: Δ between 0.001 and 0.1, A from -1 to -states."""
    torch.manual_seed(0)
    rows = (batch, length)
    dt_bias = torch.empty(channels).uniform_(-6.9, -2.3)
    values = [
        torch.randn(*rows, channels),
        torch.randn(*rows, channels) * 0.1,
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        torch.randn(*rows, states),
        torch.randn(*rows, states),
        torch.ones(channels),
        torch.randn(*rows, channels),
        dt_bias,
    ]
    return [value.requires_grad_() for value in values]


def measure(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of one forward and one backward."""
    begin = time.perf_counter()
    y = function(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(y.sum(), inputs)
    return (middle - begin) * 1e3, (time.perf_counter() - middle) * 1e3


def describe(times: list[float]) -> str:
    return f"{statistics.median(times):7.1f} ({min(times):.1f}-{max(times):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'shape':22}{'':12}{'forward ms':>22}{'backward ms':>22}{'tokens/s':>10}")
    functions: dict[str, Callable[..., Any]] = {"reference": selective_scan, "step loop": step_loop}
    for shape in SHAPES:
        inputs = draw(*shape)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        for _ in range(options.repeats + 1):
            for name, function in functions.items():
                rounds[name].append(measure(function, inputs))
        for name, (_warm_up, *times) in rounds.items():
            forward, backward = ([t[i] for t in times] for i in (0, 1))
            tokens = shape[0] * shape[1] / statistics.median(map(sum, times)) * 1e3
            print(f"{shape!s:22}{name:12}{describe(forward):>22}{describe(backward):>22}{tokens:10.0f}")


if __name__ == "__main__":
    main()
