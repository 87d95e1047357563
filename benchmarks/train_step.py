"""A whole training step of mamba_130m and mamba_370m beside `mamba_ssm`'s `MambaLMHeadModel`: tokens per second.

    python -m benchmarks.train_step [--models 130m 370m] [--batch 16] [--length 2048] [--steps 12]

One process, one GPU; fp32 weights under bf16 autocast, forward, loss, backward, the gradient's norm clipped, fused
AdamW. The peer has its fused path (asserted), its fused add and norm with an fp32 residual, and PyTorch's
cross-entropy of fp32 logits. Ours is the engine that train.py takes for one GPU, with its CUDA graphs, and
engine.recompute "scan", the default, and "none". Medians over the steps after three, with the quartiles.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mixer import peer as assert_fused_path
from benchmarks.selective_scan import ask_device
from mamba_train.config import EngineConfig, ModelConfig, OptimConfig, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import join

DEPTH_AND_WIDTH = {"130m": (24, 768), "370m": (48, 1024)}
VOCABULARY, LEARNING_RATE, WARM_UP = 50280, 1e-4, 3

Step = Callable[[Tensor, Tensor], None]


def ours(size: str, policy: Recompute) -> Step:
    depth, width = DEPTH_AND_WIDTH[size]
    config = resolve_model_config(ModelConfig(name=size, n_layer=depth, d_model=width), VOCABULARY)
    engine = NativeEngine(EngineConfig(recompute=policy), join())
    engine.prepare(config, OptimConfig(lr=LEARNING_RATE), seed=0)

    def step(tokens: Tensor, targets: Tensor) -> None:
        engine.accumulate(tokens, targets, None, torch.tensor(float(targets.numel()), device="cuda"))
        engine.step(LEARNING_RATE)

    return step


def official(size: str) -> Step:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    depth, width = DEPTH_AND_WIDTH[size]
    assert_fused_path(width)
    model = MambaLMHeadModel(MambaConfig(d_model=width, n_layer=depth, vocab_size=VOCABULARY), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def row(name: str, step: Step, batch: int, length: int, steps: int) -> float:
    """Print and return the median rate."""
    torch.cuda.reset_peak_memory_stats()
    rates = []
    for _ in range(WARM_UP + steps):
        tokens = torch.randint(0, VOCABULARY, (batch, length + 1), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(tokens[:, :-1], tokens[:, 1:])
        torch.cuda.synchronize()
        rates.append(batch * length / (time.perf_counter() - start))
    low, median, high = statistics.quantiles(rates[WARM_UP:], n=4)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"  {name:10s} {median:9,.0f} ({low:,.0f} to {high:,.0f}) tokens/s, {peak:.1f} GiB", end="", flush=True)
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(DEPTH_AND_WIDTH), choices=list(DEPTH_AND_WIDTH))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    import mamba_ssm

    print(ask_device("name,driver_version,clocks.max.sm"))
    print(f"torch {torch.__version__}, mamba_ssm {mamba_ssm.__version__}")
    sizes = (arguments.batch, arguments.length, arguments.steps)
    for size in arguments.models:
        print(f"mamba_{size}, {arguments.batch} sequences of {arguments.length} tokens")
        theirs = row("mamba_ssm", official(size), *sizes)
        print()
        for policy in (Recompute.scan, Recompute.none):
            gc.collect()
            torch.cuda.empty_cache()
            print(f", {row(policy.value, ours(size, policy), *sizes) / theirs:.2f}x")


if __name__ == "__main__":
    main()
