"""The norms beside mamba_ssm's, with the floor that bytes set.

    python -m benchmarks.rms_norm [--quick | --sweep]

"add" is the residual add and norm that open a block (bf16 activations, fp32 residual), and "plain" the norm alone, both
against `rms_norm_fn`; "gated" is the norm over groups that follows SSD, against `layernorm_gated.rmsnorm_fn`. One
process, one GPU: each row times the same inputs. GPU times are medians over replays of CUDA graphs of several calls
that take turns, with the spread of the middle half; the ratio, mamba_ssm's time over ours, is taken turn by turn. Eager
times are what a user sees who calls it from Python.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.selective_scan import (
    ask_device,
    copy_bytes_per_second,
    eager_time,
    graph_time,
    graph_turns,
    ratio,
    summary,
)
from kernels.rms_norm import add_rms_norm, gated_rms_norm, launch, rms_norm, shapes

EPS = 1e-5
ADD = [(16384, 768), (65536, 768), (16384, 1024), (16384, 2048), (16384, 2560), (131072, 2560), (16384, 5120)]
SWEEP = [("add", 2048, 768), ("add", 7328, 608), ("add", 16384, 768), ("add", 14000, 1288), ("add", 16384, 2560)]
SWEEP += [("add", 16384, 5120), ("plain", 4096, 768), ("plain", 16384, 2560)]
SWEEP += [("gated", 1154, 928), ("gated", 16384, 1536), ("gated", 16384, 4096), ("gated", 16384, 5120)]
PLAIN = [(16384, 768), (16384, 2560)]
GATED = [(16384, 1536, 1), (16384, 4096, 1), (16384, 5120, 1), (131072, 5120, 1), (16384, 4096, 8)]
Operator = Callable[..., tuple[Tensor, ...]]


def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm(x, residual, weight, EPS)


def official_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return rms_norm_fn(x, weight, None, residual=residual, eps=EPS, prenorm=True, residual_in_fp32=True)


def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm(x, weight, eps=EPS),)


def official_plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return (rms_norm_fn(x, weight, None, eps=EPS),)


def gated(groups: int) -> Operator:
    return lambda x, z, weight: (gated_rms_norm(x, z, weight, eps=EPS, group_size=x.shape[-1] // groups),)


def official_gated(groups: int) -> Operator:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    def operator(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        size = x.shape[-1] // groups
        return (rmsnorm_fn(x, weight, None, z=z, eps=EPS, group_size=size, norm_before_gate=False),)

    return operator


class Kind(NamedTuple):
    operators: Callable[[int], tuple[Operator, Operator]]
    """Ours and the official one, for a number of groups."""
    dtypes: list[torch.dtype]
    """Of the activations but x."""
    bytes: tuple[int, int]
    """That the forward and the backward move for each number of x."""


KINDS = {
    # x, residual, y, sum; then dy, sum, its gradient, dx, the residual's gradient
    "add": Kind(lambda _: (add, official_add), [torch.float32], (12, 16)),
    # x, y; then dy, x, dx
    "plain": Kind(lambda _: (plain, official_plain), [], (4, 6)),
    # x, z, y; then dy, x, z, dx, dz
    "gated": Kind(lambda groups: (gated(groups), official_gated(groups)), [torch.bfloat16], (6, 10)),
}


def make_inputs(kind: str, rows: int, channels: int) -> list[Tensor]:
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    others = [torch.randn_like(x, dtype=dtype) for dtype in KINDS[kind].dtypes]
    return [x, *others, torch.ones(channels, device="cuda")]


def calls(operator: Operator, inputs: list[Tensor]) -> list[Callable[[], object]]:
    """Forward alone, and forward with backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    grads = [torch.randn_like(output) for output in operator(*inputs)]

    def forward() -> object:
        with torch.no_grad():
            return operator(*inputs)

    return [forward, lambda: torch.autograd.grad(operator(*inputs), inputs, grads)]


def row(kind: str, rows: int, channels: int, groups: int, copy_rate: float) -> str:
    inputs, numbers = make_inputs(kind, rows, channels), rows * channels
    pairs = [calls(operator, inputs) for operator in KINDS[kind].operators(groups)]
    counts = KINDS[kind].bytes
    text = f"{f'{kind}, {groups}' if groups > 1 else kind:>8} {rows:7d} {channels:5d}"
    for part, count in enumerate((counts[0], sum(counts))):
        turns = graph_turns([pair[part] for pair in pairs])
        ours, theirs = (summary(samples) for samples in turns)
        rates = " ".join(f"{1e-9 * count * numbers / time.median:4.2f}" for time in (ours, theirs))
        floor = 1e3 * count * numbers / copy_rate
        text += f" | {ours} {theirs} {ratio(turns[1], turns[0])} {rates} {floor:6.3f} {ours.median / floor:5.2f}x"
    return text + " | " + " ".join(f"{eager_time(pair[1]):8.3f}" for pair in pairs)


def drawn() -> list[tuple[str, int, int, int]]:
    """A shape of each kind, and a small one of up to 4 million numbers."""
    found = []
    for kind in KINDS:
        for is_small in (False, True):
            groups = random.choice([1, 2, 4, 8]) if kind == "gated" else 1
            channels = 8 * groups * random.randint(32 // groups, 640 // groups)
            rows = random.randint(64, 2**22 // channels) if is_small else random.randint(1000, 30000)
            found.append((kind, rows, channels, groups))
    return found


def launches(size: int) -> list[shapes.Shape]:
    """Of the forward, by which a thread has 4 to 32 channels."""
    blocks = dict.fromkeys((shapes.piece(size), 1 << (size - 1).bit_length()))
    return [
        shapes.Shape(rows, block, warps)
        for rows, block, warps in itertools.product((1, 2, 4), blocks, (1, 2, 4, 8, 16, 32))
        if 4 <= rows * -(-size // block) * block // (32 * warps) <= 32
    ]


def sweep(kind: str, rows: int, channels: int, best: int = 6) -> None:
    """The forward with other launch shapes, beside mamba_ssm's: microseconds of the best few.

    "waits": as chosen, but launched when the kernel before has ended.
    """
    inputs = make_inputs(kind, rows, channels)
    ours, official = KINDS[kind].operators(1)
    chosen = shapes.forward_shape(channels, kind == "gated", kind == "plain")

    def microseconds(operator: Operator, replays: int = 9) -> float:
        return 1e3 * graph_time(lambda: operator(*inputs), replays).median

    with torch.no_grad():
        theirs = microseconds(official)
        with mock.patch.object(launch, "early_start", return_value={"PDL": False}):
            waits = microseconds(ours)
        times = []
        for shape in dict.fromkeys([chosen, *launches(channels)]):
            with mock.patch.object(launch, "forward_shape", return_value=shape):
                times.append((microseconds(ours, replays=5), tuple(shape)))
    found = "; ".join(f"{time:.2f} {shape}" for time, shape in sorted(times)[:best])
    print(f"{kind} {rows} x {channels}: mamba_ssm {theirs:.2f}, chosen {tuple(chosen)}, waits {waits:.2f}; {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the table's rows")
    parser.add_argument("--sweep", action="store_true", help="launch shapes instead")
    arguments = parser.parse_args()
    quick = arguments.quick
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; bf16, weight and residual fp32")
    if arguments.sweep:
        for shape in SWEEP:
            sweep(*shape)
        return
    rate = copy_bytes_per_second()
    print(f"copy {rate / 1e12:.2f} TB/s; times in ms; floor: every activation and gradient once at that rate")
    print(
        "          rows     d | forward: ours, mamba_ssm, ratio, TB/s of both, floor, ours / floor"
        " | the same of forward + backward | eager forward + backward: ours, mamba_ssm"
    )
    rows = [("add", *shape, 1) for shape in ADD] + [("plain", *shape, 1) for shape in PLAIN]
    rows += [("gated", *shape) for shape in GATED]
    if not quick:
        rows += drawn()
    for each in rows:
        print(row(*each, rate), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
