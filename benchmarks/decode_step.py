"""The decode steps of scan and convolution beside mamba_ssm's and causal_conv1d's, and plain PyTorch.

    python -m benchmarks.decode_step [--sweep]

GPU times are medians over replays of a CUDA graph of 20 calls, each on tensors of its own, as the layers of a model
are: one and the same state would stay in the GPU's cache. Eager times are wall time of a call from Python. The peers
change the state in place, ours returns a new one; either way it is read and written once. `--sweep` times launch
parameters instead.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.selective_scan import ask_device, copy_bytes_per_second, eager_time, once
from kernels.causal_conv1d import causal_conv1d_step
from kernels.causal_conv1d import step as conv_step
from kernels.selective_scan import selective_scan_step, step, step_launch

LAYERS = 20
SHAPES = [(1, 1536), (1, 5120), (8, 1536), (64, 1536), (64, 4096), (64, 5120)]
Call = Callable[[int], object]  # of a layer


def layers_time(call: Call) -> float:
    """Microseconds of GPU time of one call."""
    kept: list[object] = []  # else the outputs of all layers would share their memory
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept += [call(layer) for layer in range(LAYERS)]
    graph.replay()
    return 1e3 * statistics.median(once(graph.replay) for _ in range(21)) / LAYERS


def scan_layer(batch: int, channels: int, states: int = 16) -> dict[str, Tensor]:
    def activation(width: int) -> Tensor:
        return torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)

    return {
        "state": torch.randn(batch, channels, states, device="cuda"),
        "x": activation(channels),
        "dt": activation(channels),
        "A": -torch.rand(channels, states, device="cuda"),
        "B": activation(states),
        "C": activation(states),
        "D": torch.ones(channels, device="cuda"),
        "z": activation(channels),
        "dt_bias": torch.randn(channels, device="cuda") - 4,
    }


def conv_layer(batch: int, channels: int, width: int = 4) -> dict[str, Tensor]:
    return {
        "state": torch.randn(batch, width - 1, channels, device="cuda", dtype=torch.bfloat16),
        "x": torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16),
        "weight": torch.randn(channels, width, device="cuda"),
        "bias": torch.randn(channels, device="cuda"),
    }


def scan_calls(layers: list[dict[str, Tensor]]) -> list[Call | None]:
    ours: Call = lambda layer: selective_scan_step(**layers[layer])  # noqa: E731
    plain: Call = lambda layer: step._reference(*layers[layer].values(), True, False)  # noqa: E731
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        return [ours, None, plain]
    return [ours, lambda layer: selective_state_update(*layers[layer].values(), dt_softplus=True), plain]


def conv_calls(layers: list[dict[str, Tensor]]) -> list[Call | None]:
    ours: Call = lambda layer: causal_conv1d_step(**layers[layer], activation="silu")  # noqa: E731
    plain: Call = lambda layer: conv_step._reference(*layers[layer].values(), True)  # noqa: E731
    try:
        from causal_conv1d import causal_conv1d_update
    except ImportError:
        return [ours, None, plain]
    # The peer's state holds `width` inputs, channel first; weight and bias in the dtype of x.
    theirs = [
        (v["x"], torch.cat([v["state"], v["x"].unsqueeze(1)], 1).transpose(1, 2).contiguous(),
         v["weight"].bfloat16(), v["bias"].bfloat16())
        for v in layers
    ]  # fmt: skip
    return [ours, lambda layer: causal_conv1d_update(*theirs[layer], activation="silu"), plain]


def compare() -> None:
    rate = copy_bytes_per_second()
    print(f"copy {rate / 1e12:.2f} TB/s; all times in µs; 'bytes' = everything read and written once at that rate")
    print("operator  batch channels | GPU: ours    peer  PyTorch  bytes | eager: ours    peer  PyTorch")
    shapes = SHAPES + [(random.randint(1, 64), 8 * random.randint(32, 1024)) for _ in range(5)]
    for batch, channels in shapes:
        for name, make, calls in (("scan", scan_layer, scan_calls), ("conv", conv_layer, conv_calls)):
            layers = [make(batch, channels) for _ in range(LAYERS)]
            found = calls(layers)
            gpu = [f"{layers_time(call):8.2f}" if call else "       -" for call in found]
            eager = [f"{1e3 * eager_time(lambda c=call: c(0), 200):8.1f}" if call else "       -" for call in found]
            moved = sum(v.nbytes for v in layers[0].values()) + layers[0]["state"].nbytes + layers[0]["x"].nbytes
            print(f"{name:<9} {batch:5d} {channels:8d} | {' '.join(gpu)} {1e6 * moved / rate:7.2f} | {' '.join(eager)}")


def sweep() -> None:
    chosen = step_launch.LAUNCH, conv_step.LAUNCH
    for batch, channels in ((1, 1536), (64, 5120)):
        layers = [scan_layer(batch, channels) for _ in range(LAYERS)]
        for elements in (256, 512, 1024):
            cells = []
            for warps in (1, 2, 4):
                step_launch.LAUNCH = step_launch.Launch(elements, warps)
                cells.append(f"{layers_time(lambda layer, v=layers: selective_scan_step(**v[layer])):7.2f}")
            print(
                f"scan {batch:3d} {channels:5d}, {elements:5d} elements, 1, 2, 4 warps: {' '.join(cells)}",
                flush=True,
            )
        layers = [conv_layer(batch, channels) for _ in range(LAYERS)]
        for block in (128, 256):
            cells = []
            for warps in (1, 2, 4):
                conv_step.LAUNCH = conv_step.Launch(block, warps)
                cells.append(f"{layers_time(lambda layer, v=layers: causal_conv1d_step(**v[layer])):7.2f}")
            print(f"conv {batch:3d} {channels:5d}, {block:5d} channels, 1, 2, 4 warps: {' '.join(cells)}", flush=True)
    step_launch.LAUNCH, conv_step.LAUNCH = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="launch parameters instead")
    arguments = parser.parse_args()
    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    print(f"torch {torch.__version__}; bf16 activations, fp32 state of 16, width 4")
    with torch.no_grad():
        sweep() if arguments.sweep else compare()


if __name__ == "__main__":
    main()
