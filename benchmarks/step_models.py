"""Whole training steps, ours and `mamba_ssm`'s, for the benchmarks that compare them.

Both have fp32 weights under bf16 autocast and do the same: forward, loss, backward for each micro-batch, the
gradient's norm clipped to 1, fused AdamW. Ours is the engine that train.py takes for one GPU; the peer is
`MambaLMHeadModel` with its fused path (asserted), its fused add and norm with an fp32 residual, and PyTorch's
cross-entropy of fp32 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mixer import peer as assert_fused_path
from mamba_train.checkpoint.pieces import Piece
from mamba_train.composition import compose_config
from mamba_train.config import EngineConfig, MixerKind, ModelConfig, OptimConfig, Recompute
from mamba_train.model.contract import Role, rule_for
from mamba_train.model.initialise import draw
from mamba_train.model.language_model import padded_vocab_size, resolve_model_config
from mamba_train.parallel import native
from mamba_train.parallel.auto import layers_to_recompute, with_recompute
from mamba_train.parallel.graphed import GraphedPasses
from mamba_train.ranks import join

CONF = Path(__file__).resolve().parents[1] / "conf" / "model"
VOCABULARY, LEARNING_RATE, MAX_NORM = 50280, 1e-4, 1.0

Batches = list[Tensor]  # micro-batches of one step, each (rows, length + 1), pinned
Step = Callable[[Batches], object]


def model_config(name: str, layers: int | None = None) -> ModelConfig:
    """A model of conf/model, resolved; layers: fewer or more of them than it has."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    config = cast(ModelConfig, OmegaConf.to_object(merged))
    config.n_layer = layers or config.n_layer
    return resolve_model_config(config, VOCABULARY)


def engine_config(model: ModelConfig, policy: Recompute, graphs: bool | None, rows: int, length: int) -> EngineConfig:
    """What a run with these settings gets; "auto" as train.py resolves it."""
    shape = [
        f"training.micro_batch_size={rows}",
        f"training.global_batch_size={rows}",
        f"data.sequence_length={length}",
    ]
    config = compose_config([*shape, "engine=single", "run_dir=unused"])
    config.model = model
    config.engine = EngineConfig(recompute=policy, cuda_graphs=graphs)
    if policy is not Recompute.auto:
        return config.engine
    memory = torch.cuda.get_device_properties(0).total_memory
    return with_recompute(config.engine, layers_to_recompute(config, 1, memory))


def ours(config: ModelConfig, settings: EngineConfig) -> Step:
    # Drawing 1.4 billion numbers on the CPU, as a run does for its bits, would be most of the benchmark.
    native.draw_pieces = draw_on_device
    engine = native.NativeEngine(settings, join())
    engine.prepare(config, OptimConfig(lr=LEARNING_RATE, max_grad_norm=MAX_NORM), seed=0)

    def step(batches: Batches) -> object:
        n_targets = torch.tensor(float(sum(batch[:, 1:].numel() for batch in batches)), device=engine.device)
        for batch in engine.micro_batches(batches):
            tokens = batch.to(engine.device, non_blocking=True)
            engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets)
        return engine.step(LEARNING_RATE)

    return step


@torch.no_grad()
def draw_on_device(pieces: Mapping[str, Piece], config: ModelConfig, seed: int) -> None:
    for name, piece in pieces.items():
        role = rule_for(name).role
        if len(piece.shape) < 2 or role is Role.a_log:
            piece.values.copy_(piece.of(draw(name, torch.Size(piece.shape), config, seed)))
        elif role is Role.embedding:
            piece.values.normal_(0.0, 0.02)
        else:
            piece.values.uniform_(-1, 1).mul_(piece.shape[-1] ** -0.5)


def peer_model(config: ModelConfig) -> nn.Module:
    """mamba_ssm's model of the same shape, on the GPU.

    Its first step tries some 200 launch shapes of Triton; here each for 20 ms, not 125.
    """
    import triton.testing
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    triton.testing.do_bench.__defaults__ = (5, 15, *triton.testing.do_bench.__defaults__[2:])
    is_mamba2 = config.mixer is MixerKind.mamba2
    if not is_mamba2:
        assert_fused_path(config.d_model)
    layer = {"layer": "Mamba2", "d_state": config.d_state, "headdim": config.head_dim} if is_mamba2 else {}
    return MambaLMHeadModel(
        MambaConfig(
            d_model=config.d_model,
            n_layer=config.n_layer,
            vocab_size=padded_vocab_size(config),
            ssm_cfg=layer,
            pad_vocab_size_multiple=config.pad_vocab_size_multiple,
        ),
        device="cuda",
    )


def peer(config: ModelConfig) -> Step:
    step = peer_step(peer_model(config), OptimConfig(lr=LEARNING_RATE, max_grad_norm=MAX_NORM))
    return lambda batches: step(batches, LEARNING_RATE)


def peer_step(model: nn.Module, optim: OptimConfig, graphs: bool = False) -> Callable[[Batches, float], Tensor]:
    """Steps of mamba_ssm's model, of micro-batches and a learning rate; returns the mean loss.

    As its users write them, launch by launch; graphs: with the passes as a CUDA graph, which changes no number.
    """
    kept = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False) or p.ndim == 1]
    decayed = [p for p in model.parameters() if not any(p is other for other in kept)]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def passes(inputs: Tensor, targets: Tensor, _: None, n_targets: Tensor, variant: object = None) -> Tensor:
        # A graph must find no casts of an earlier call.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=not graphs):
            logits = model(inputs.contiguous()).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / n_targets
        loss.backward()
        return loss.detach()

    call = GraphedPasses(passes) if graphs else passes

    def step(batches: Batches, lr: float) -> Tensor:
        n_targets = torch.full((), float(sum(batch[:, 1:].numel() for batch in batches)), device="cuda")
        total = torch.zeros((), device="cuda")
        for batch in batches:
            tokens = batch.to("cuda", non_blocking=True)
            total += call(tokens[:, :-1], tokens[:, 1:], None, n_targets)
        nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphs)
        return total

    return step
