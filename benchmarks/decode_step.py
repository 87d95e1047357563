"""The decode steps of scan, SSD and convolution beside mamba_ssm's and causal_conv1d's, and plain PyTorch.

    python -m benchmarks.decode_step [--sweep]

GPU times are medians over replays of a CUDA graph of 20 calls, each on tensors of its own, as the layers of a model
are: one and the same state would stay in the GPU's cache. Eager times are wall time of a call from Python. All change
their state in place but plain PyTorch, which returns a new one; either way it is read and written once. `--sweep` times
launch parameters instead, also with a state in bf16.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.selective_scan import ask_device, copy_bytes_per_second, eager_time, once
from kernels.causal_conv1d import causal_conv1d_step
from kernels.causal_conv1d import step as conv_step
from kernels.selective_scan import selective_scan_step, step, step_launch
from kernels.ssd import ssd_step
from kernels.ssd import step as ssd_plain
from kernels.ssd import step_launch as ssd_launch

LAYERS = 20
HEADS = [(1, 64), (8, 64), (64, 24), (64, 64), (64, 80)]  # of 64 channels, 128 states
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


def ssd_layer(batch: int, heads: int, head_dim: int = 64, states: int = 128) -> dict[str, Tensor]:
    def activation(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device="cuda", dtype=torch.bfloat16)

    return {
        "state": torch.randn(batch, heads, head_dim, states, device="cuda"),
        "x": activation(heads, head_dim),
        "dt": activation(heads),
        "A": -torch.rand(heads, device="cuda"),
        "B": activation(1, states),
        "C": activation(1, states),
        "D": torch.ones(heads, device="cuda"),
        "z": activation(heads, head_dim),
        "dt_bias": torch.randn(heads, device="cuda") - 4,
    }


def conv_layer(batch: int, channels: int, width: int = 4) -> dict[str, Tensor]:
    return {
        "state": torch.randn(batch, width - 1, channels, device="cuda", dtype=torch.bfloat16),
        "x": torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16),
        "weight": torch.randn(channels, width, device="cuda"),
        "bias": torch.randn(channels, device="cuda"),
    }


def scan_calls(layers: list[dict[str, Tensor]]) -> list[Call | None]:
    ours: Call = lambda layer: selective_scan_step(**layers[layer], in_place=True)  # noqa: E731
    plain: Call = lambda layer: step._reference(*layers[layer].values(), True, False)  # noqa: E731
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        return [ours, None, plain]
    return [ours, lambda layer: selective_state_update(*layers[layer].values(), dt_softplus=True), plain]


def ssd_calls(layers: list[dict[str, Tensor]]) -> list[Call | None]:
    ours: Call = lambda layer: ssd_step(**layers[layer], in_place=True)  # noqa: E731
    plain: Call = lambda layer: ssd_plain._reference(*layers[layer].values(), True, 0.0, math.inf, False)  # noqa: E731
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        return [ours, None, plain]

    def as_theirs(v: dict[str, Tensor]) -> list[Tensor]:
        """One rate, Δ and bias for each channel of a head: views, as their module makes them."""
        _, heads, head_dim, states = v["state"].shape
        wide = {name: v[name].unsqueeze(-1).expand(*v[name].shape, head_dim) for name in ("A", "dt", "dt_bias", "D")}
        wide["A"] = wide["A"].unsqueeze(-1).expand(heads, head_dim, states)
        return [(v | wide)[name] for name in v]

    theirs = [as_theirs(v) for v in layers]
    return [ours, lambda layer: selective_state_update(*theirs[layer], dt_softplus=True), plain]


def conv_calls(layers: list[dict[str, Tensor]]) -> list[Call | None]:
    ours: Call = lambda layer: causal_conv1d_step(**layers[layer], activation="silu", in_place=True)  # noqa: E731
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
    print("operator  batch   width | GPU: ours    peer  PyTorch  bytes | eager: ours    peer  PyTorch")
    shapes = SHAPES + [(random.randint(1, 64), 8 * random.randint(32, 1024)) for _ in range(5)]
    heads = HEADS + [(random.randint(1, 64), random.randint(8, 80)) for _ in range(2)]
    for name, make, calls, rows in (
        ("scan", scan_layer, scan_calls, shapes),
        ("conv", conv_layer, conv_calls, shapes),
        ("ssd", ssd_layer, ssd_calls, heads),
    ):
        for batch, width in rows:
            layers = [make(batch, width) for _ in range(LAYERS)]
            found = calls(layers)
            gpu = [f"{layers_time(call):8.2f}" if call else "       -" for call in found]
            eager = [f"{1e3 * eager_time(lambda c=call: c(0), 200):8.1f}" if call else "       -" for call in found]
            moved = sum(v.nbytes for v in layers[0].values()) + layers[0]["state"].nbytes + layers[0]["x"].nbytes
            print(f"{name:<9} {batch:5d} {width:7d} | {' '.join(gpu)} {1e6 * moved / rate:7.2f} | {' '.join(eager)}")


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
    sweep_states()


def sweep_states() -> None:
    """Scan and SSD for 64 sequences, where the state is all that counts."""
    chosen = step_launch.LAUNCH, ssd_launch.LAUNCH
    for name, make, step_of, module, width in (
        ("scan", scan_layer, selective_scan_step, step_launch, 4096),
        ("ssd", ssd_layer, ssd_step, ssd_launch, 64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            layers = [make(64, width) for _ in range(LAYERS)]
            for layer in layers:
                layer["state"] = layer["state"].to(dtype)
            for elements in (512, 1024, 2048, 4096, 8192):
                cells = []
                for warps in (2, 4, 8):
                    module.LAUNCH = module.Launch(elements, warps)
                    call: Call = lambda layer, v=layers, f=step_of: f(**v[layer], in_place=True)  # noqa: E731
                    cells.append(f"{layers_time(call):7.2f}")
                print(
                    f"{name:4} 64 {width}, {dtype}, {elements:5d} elements, 2, 4, 8 warps: {' '.join(cells)}",
                    flush=True,
                )
    step_launch.LAUNCH, ssd_launch.LAUNCH = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="launch parameters instead")
    arguments = parser.parse_args()
    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    print(f"torch {torch.__version__}; bf16 activations, fp32 state; scan: 16 states, conv: width 4, ssd: heads of 64")
    with torch.no_grad():
        sweep() if arguments.sweep else compare()


if __name__ == "__main__":
    main()
