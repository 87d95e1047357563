"""One small model of each family, with sizes that are all different, so that a swapped pair shows."""

from typing import Any

import torch

from mamba_train.config import MixerKind, ModelConfig
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config

_MAMBA2 = {"mixer": MixerKind.mamba2, "head_dim": 10, "chunk_size": 16}
_ATTENTION = {"attention_heads": 6, "attention_kv_heads": 2, "attention_head_dim": 12}

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba1": {},
    "mamba2": _MAMBA2,
    "mamba2_groups": {**_MAMBA2, "n_groups": 4},
    "mamba1_mlp": {"d_intermediate": 56},
    # The parts that the published hybrid has: few heads that rotate in part, after a convolution.
    "hybrid": {**_MAMBA2, **_ATTENTION, "attention_layers": [1], "attention_d_conv": 3, "rotary_dim": 8},
    "transformer": {"mixer": MixerKind.attention, **_ATTENTION, "d_intermediate": 56},
}


def small_config(family: str, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"n_layer": 3, "d_model": 40, "d_state": 6, "d_conv": 4, "pad_vocab_size_multiple": 16}
    config = ModelConfig(name="test", **{**sizes, **FAMILIES[family], **changes})
    return resolve_model_config(config, tokenizer_vocab_size=53)


def perturbed(config: ModelConfig) -> MambaLM:
    """A model with no weight at its initial value."""
    model = MambaLM(config)
    initialise_(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def lively(family: str) -> MambaLM:
    """A perturbed model whose greedy text goes on changing: its layers outweigh the embedding of the last token."""
    model = perturbed(small_config(family, tie_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "x_proj_weight")):
                parameter *= 4
            elif name.endswith("mixer.in_proj.weight"):
                parameter *= 2
    return model
