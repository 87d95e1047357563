"""A whole training step of mamba_130m and mamba_370m beside `mamba_ssm`'s `MambaLMHeadModel`: tokens per second.

    python -m benchmarks.train_step [--models 130m 370m] [--batch 16] [--length 2048] [--steps 12]

One process, one GPU, one optimiser for both: fp32 weights under bf16 autocast, forward, loss, backward, the gradient's
norm clipped, fused AdamW. The peer has its fused path (asserted), its fused add and norm with an fp32 residual, and
PyTorch's cross-entropy of fp32 logits. Ours computes as engine.recompute says: "scan", the default on a GPU, and
"none". Called from Python without graphs. Medians over the steps after three, with the quartiles.
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
from mamba_train.config import ModelConfig, Recompute
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.parallel.recompute import recompute_activations

DEPTH_AND_WIDTH = {"130m": (24, 768), "370m": (48, 1024)}
VOCABULARY, WARM_UP = 50280, 3

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(size: str, policy: Recompute) -> tuple[nn.Module, Loss]:
    depth, width = DEPTH_AND_WIDTH[size]
    config = resolve_model_config(ModelConfig(name=size, n_layer=depth, d_model=width), VOCABULARY)
    model = MambaLM(config).cuda()
    initialise_(model, config, seed=0)
    recompute_activations(model, policy, torch.device("cuda"))
    return model, lambda tokens, targets: model(tokens, targets) / targets.numel()


def official(size: str) -> tuple[nn.Module, Loss]:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    depth, width = DEPTH_AND_WIDTH[size]
    assert_fused_path(width)
    model = MambaLMHeadModel(MambaConfig(d_model=width, n_layer=depth, vocab_size=VOCABULARY), device="cuda")

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten())

    return model, loss


def step_seconds(model: nn.Module, loss: Loss, batch: int, length: int, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(WARM_UP + steps):
        tokens = torch.randint(0, VOCABULARY, (batch, length + 1), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def row(name: str, made: tuple[nn.Module, Loss], batch: int, length: int, steps: int) -> float:
    torch.cuda.reset_peak_memory_stats()
    rates = [batch * length / s for s in step_seconds(*made, batch, length, steps)]
    low, median, high = statistics.quantiles(rates, n=4)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"  {name:12s} {median:9,.0f} ({low:,.0f} to {high:,.0f}) tokens/s, {peak:.1f} GiB", flush=True)
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
        for policy in (Recompute.scan, Recompute.none):
            gc.collect()
            torch.cuda.empty_cache()
            print(f"  {row(policy.value, ours(size, policy), *sizes) / theirs:.2f}x")


if __name__ == "__main__":
    main()
