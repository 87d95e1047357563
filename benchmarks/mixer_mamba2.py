"""The Mamba-2 mixer beside `mamba_ssm.Mamba2` with its fused path: forward and backward, GPU time and memory.

    python -m benchmarks.mixer_mamba2 [--widths 2048] [--batch 8] [--length 2048]

Both have the same fp32 weights under bf16 autocast and get the same inputs; gradients go to the input and to all
weights. The peer has its fast path only with the package causal-conv1d: without it nothing is measured. GPU times are
medians over replays of a CUDA graph of several calls, with the middle half's spread. "saved" and "peak" as in
`benchmarks.mixer`.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.mixer import LARGEST_DIFFERENCE, memory, runs
from benchmarks.selective_scan import ask_device, eager_time, graph_time
from mamba_train.config import ModelConfig
from mamba_train.model.mixers import Mamba2Mixer

PEER_NAMES = {
    "in_proj.weight": "in_proj.weight",
    "out_proj.weight": "out_proj.weight",
    "ssm.conv_weight": "conv1d.weight",
    "ssm.conv_bias": "conv1d.bias",
    "ssm.dt_bias": "dt_bias",
    "ssm.A_log": "A_log",
    "ssm.D": "D",
    "ssm.norm_weight": "norm.weight",
}


def peer(width: int) -> nn.Module:
    """mamba_ssm's mixer; raises where its fused path would not run."""
    from mamba_ssm.modules import mamba2

    if mamba2.causal_conv1d_fn is None:
        raise SystemExit("mamba_ssm.Mamba2 has no fast path here: the package causal-conv1d is not installed")
    return mamba2.Mamba2(width, headdim=64, d_state=128, device="cuda")


def ours(width: int, theirs: nn.Module) -> Mamba2Mixer:
    config = ModelConfig(d_model=width, n_layer=1, head_dim=64, d_state=128, n_groups=1)
    mixer, weights = Mamba2Mixer(config).cuda(), dict(theirs.named_parameters())
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(weights[PEER_NAMES[name]].view_as(parameter))
    return mixer


def table(width: int, batch: int, length: int) -> None:
    theirs = peer(width)
    hidden = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(hidden)
    print(f"d_model {width}, batch {batch}, length {length}")
    outputs, times = [], []
    for name, mixer in (("mamba_ssm", theirs), ("ours", ours(width, theirs))):
        forward, both = runs(mixer, hidden, grad)
        saved, peak = memory(forward, both)
        with torch.no_grad():
            outputs.append(forward())
        times.append(graph_time(both))
        ratio, eager = times[0].median / times[-1].median, eager_time(both)
        print(
            f"  {name:10s} {times[-1]} ms {ratio:5.2f}x | eager {eager:8.3f} | saved {saved:.3f} peak {peak:.3f} GiB",
            flush=True,
        )
        torch.cuda.empty_cache()
    difference = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert difference < LARGEST_DIFFERENCE, f"the outputs differ by {difference:.4f} of their norm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[2048])
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
