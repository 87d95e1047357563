"""One small model of each family, all sizes different so that a swapped pair shows."""

import dataclasses
from typing import Any

from mamba_train.config import MixerKind, ModelConfig

MAMBA1 = ModelConfig(name="m1", n_layer=3, d_model=40, d_state=6, d_conv=3, pad_vocab_size_multiple=16)
MAMBA1_UNTIED = dataclasses.replace(MAMBA1, name="m1_untied", tie_embeddings=False, dt_rank=5)
MAMBA2 = ModelConfig(
    name="m2",
    mixer=MixerKind.mamba2,
    n_layer=3,
    d_model=48,
    d_state=10,
    head_dim=8,
    chunk_size=16,
    pad_vocab_size_multiple=16,
)
MAMBA2_GROUPED = dataclasses.replace(MAMBA2, name="m2_grouped", n_groups=4, tie_embeddings=False)
HYBRID = dataclasses.replace(
    MAMBA2,
    name="hybrid",
    attention_layers=[1],
    attention_heads=6,
    attention_kv_heads=3,
    attention_head_dim=10,
    attention_d_conv=4,
    rotary_dim=4,
)
HYBRID_OF_MAMBA1 = dataclasses.replace(
    MAMBA1, name="hybrid_m1", attention_layers=[0, 2], attention_heads=4, d_intermediate=128
)
TRANSFORMER = ModelConfig(
    name="tpp", mixer=MixerKind.attention, n_layer=2, d_model=40, attention_heads=5, d_intermediate=256
)
PURE = [MAMBA1, MAMBA1_UNTIED, MAMBA2, MAMBA2_GROUPED]
ALL = [*PURE, HYBRID, HYBRID_OF_MAMBA1, TRANSFORMER]


def as_dict(config: ModelConfig) -> dict[str, Any]:
    """The config of a run of this model, as its checkpoints hold it."""
    return {
        "model": dataclasses.asdict(config),
        "data": {"name": "words", "source": "local", "sequence_length": 32},
        "optim": {"lr": 1e-3},
        "schedule": {"kind": "cosine"},
        "training": {"total_steps": 10, "global_batch_size": 4},
        "seed": 3,
    }
