"""The Mamba-1 mixer beside `mamba_ssm.Mamba` with its fused path: forward and backward, GPU time and memory.

    python -m benchmarks.mixer [--widths 2560 2048 768] [--batch 8] [--length 2048]

Both have the same fp32 weights under bf16 autocast and get the same inputs; gradients go to the input and to all
weights. "scan" and "none" are ours with that value of engine.recompute. The peer has its fast path only with the
package causal-conv1d: without it nothing is measured. GPU times are medians over replays of a CUDA graph of several
calls, with the middle half's spread. "saved": GiB that a forward leaves for the backward beside its input and output;
"peak": the most that a call has beyond input, weights, and the gradient that it is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.selective_scan import ask_device, eager_time, graph_time
from mamba_train.config import ModelConfig
from mamba_train.model.mixers import Mamba1Mixer

GIB = 2**30
PEER_NAMES = {
    "in_proj.weight": "in_proj.weight",
    "out_proj.weight": "out_proj.weight",
    "ssm.conv_weight": "conv1d.weight",
    "ssm.conv_bias": "conv1d.bias",
    "ssm.x_proj_weight": "x_proj.weight",
    "ssm.dt_proj_weight": "dt_proj.weight",
    "ssm.dt_bias": "dt_proj.bias",
    "ssm.A_log": "A_log",
    "ssm.D": "D",
}
MATRICES = ("in_proj.weight", "out_proj.weight", "ssm.x_proj_weight", "ssm.dt_proj_weight")
LARGEST_DIFFERENCE = 0.02  # of the outputs, relative to their norm: bf16


def peer(width: int) -> nn.Module:
    """mamba_ssm's mixer; raises where its fused path would not run."""
    from mamba_ssm.modules import mamba_simple

    if mamba_simple.causal_conv1d_fn is None:
        raise SystemExit("mamba_ssm.Mamba has no fast path here: the package causal-conv1d is not installed")
    fused, calls = mamba_simple.mamba_inner_fn, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return fused(*arguments, **options)

    mixer = mamba_simple.Mamba(width, device="cuda")
    mamba_simple.mamba_inner_fn = counted
    try:
        mixer(torch.zeros(1, 8, width, device="cuda"))
    finally:
        mamba_simple.mamba_inner_fn = fused
    assert calls, "mamba_ssm.Mamba took its slow path"
    return mixer


def ours(width: int, weights: dict[str, Tensor]) -> Mamba1Mixer:
    mixer = Mamba1Mixer(ModelConfig(d_model=width, n_layer=1, dt_rank=-(-width // 16))).cuda()
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(weights[PEER_NAMES[name]].view_as(parameter))
    return mixer


def runs(mixer: nn.Module, hidden: Tensor, grad: Tensor) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """Forward, and forward with backward."""

    def forward() -> Tensor:
        # Graphs must not find the weights of another call in the cache.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            return mixer(hidden)

    wanted = [hidden, *mixer.parameters()]
    return forward, lambda: torch.autograd.grad(forward(), wanted, grad)


def memory(forward: Callable[[], Tensor], both: Callable[[], object]) -> tuple[float, float]:
    """GiB saved by a forward, and the peak of both."""
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = forward()
    saved = torch.cuda.memory_allocated() - before - output.nbytes
    del output
    torch.cuda.reset_peak_memory_stats()
    both()
    return saved / GIB, (torch.cuda.max_memory_allocated() - before) / GIB


def matrix_time(width: int, tokens: int, mixer: nn.Module) -> float:
    """Milliseconds of the matrix products alone, three for each matrix."""

    def products() -> None:
        for left, right, at_right in operands:
            torch.mm(left, right.t())
            torch.mm(at_right, right)
            torch.mm(at_right.t(), left)

    operands = []
    for name in MATRICES:
        weight = mixer.get_parameter(name).detach().bfloat16()
        rows, columns = weight.shape
        left, right = (torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (columns, rows))
        operands.append((left, weight, right))
    return graph_time(products).median


def table(width: int, batch: int, length: int) -> None:
    theirs = peer(width)
    hidden = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(hidden)
    mine, lean = (ours(width, dict(theirs.named_parameters())) for _ in range(2))
    lean.ssm.recompute_scan = True
    mixers: dict[str, nn.Module] = {"mamba_ssm": theirs, "scan": lean, "none": mine}
    print(f"d_model {width}, batch {batch}, length {length}; matrix products alone", end=" ")
    print(f"{matrix_time(width, batch * length, mine):.3f} ms", flush=True)
    outputs, times = {}, {}
    for name, mixer in mixers.items():
        forward, both = runs(mixer, hidden, grad)
        saved, peak = memory(forward, both)
        with torch.no_grad():
            outputs[name] = forward()
        times[name] = graph_time(both)
        ratio = times["mamba_ssm"].median / times[name].median
        eager = eager_time(both)
        print(
            f"  {name:10s} {times[name]} ms {ratio:5.2f}x | eager {eager:8.3f} | saved {saved:.3f} peak {peak:.3f} GiB",
            flush=True,
        )
        torch.cuda.empty_cache()
    for name in ("scan", "none"):
        difference = (outputs[name] - outputs["mamba_ssm"]).norm() / outputs["mamba_ssm"].norm()
        assert difference < LARGEST_DIFFERENCE, f"the outputs differ by {difference:.4f} of their norm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[2560, 2048, 768])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm"))
    print(
        f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}; forward + backward, bf16 autocast", flush=True
    )
    for width in arguments.widths:
        table(width, arguments.batch, arguments.length)


if __name__ == "__main__":
    main()
