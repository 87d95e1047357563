"""config.json of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`; it has no class for hybrid models."""

from typing import Any

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.convert.require import require
from mamba_train.model.language_model import padded_vocab_size

MIXERS = {"mamba": MixerKind.mamba1, "mamba2": MixerKind.mamba2}
CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
PREFERRED_MULTIPLE = 8
NO_LIMIT = (0.0, float("inf"))

# Ours -> theirs, and what holds there when the key is absent.
KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "mamba": {
        "d_state": ("state_size", 16),
        "dt_rank": ("time_step_rank", "auto"),
        "dt_scale": ("time_step_scale", 1.0),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    "mamba2": {
        "d_state": ("state_size", 128),
        "head_dim": ("head_dim", 64),
        "n_groups": ("n_groups", 8),
        "chunk_size": ("chunk_size", 256),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
}
KEYS_OF_BOTH = {
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
}
# Without defaults: those of a class describe no weights.
SIZES = {"n_layer": "num_hidden_layers", "d_model": "hidden_size"}


def to_json(config: ModelConfig, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json; raises ValueError for a model that transformers has no class for."""
    if config.d_intermediate or MixerKind.attention in layer_mixers(config):
        raise ValueError(
            f"{config.name}: transformers has no class for a model with attention or MLPs; use --layout state-spaces"
        )
    model_type = next(name for name, mixer in MIXERS.items() if mixer is config.mixer)
    values: dict[str, Any] = {"architectures": [CLASSES[model_type]], "model_type": model_type}
    values |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    values |= {theirs: getattr(config, ours) for ours, (theirs, _) in (KEYS_OF_BOTH | KEYS[model_type]).items()}
    if model_type == "mamba":
        values["intermediate_size"] = config.expand * config.d_model
    else:
        values["num_heads"] = config.expand * config.d_model // config.head_dim
    values |= {
        "vocab_size": padded_vocab_size(config),
        # Not left to the default: it was true in some releases.
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        # With true, transformers 5.23 scales the output projections again after it has loaded them.
        "rescale_prenorm_residual": False,
        "dtype": "float32",
    }
    return values | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id)


def from_json(values: dict[str, Any], name: str) -> ModelConfig:
    """The model config of a config.json; keys that change nothing that is computed are passed over.

    Raises KeyError for a missing key, ValueError naming the key for what our model cannot compute.
    """
    model_type = values["model_type"]
    require(values, use_bias=False, use_conv_bias=True, hidden_act="silu")
    fields = {ours: values[theirs] for ours, theirs in SIZES.items()}
    for ours, (theirs, default) in (KEYS_OF_BOTH | KEYS[model_type]).items():
        fields[ours] = values.get(theirs, default)
    if fields.get("dt_rank") == "auto":
        fields["dt_rank"] = None
    if fields["expand"] != int(fields["expand"]):
        raise ValueError(f"expand={fields['expand']} cannot be imported; expected a whole number")
    inner = int(fields["expand"]) * fields["d_model"]
    if model_type == "mamba":
        require(values, intermediate_size=inner)
    else:
        require(values, num_heads=inner // fields["head_dim"])
        # JSON has no infinity: it comes as a number of Python's, or as a text.
        if tuple(float(limit) for limit in _limits(values)) != NO_LIMIT:
            raise ValueError(f"time_step_limit={values['time_step_limit']} cannot be imported; expected no limit")
    rows = values["vocab_size"]
    return ModelConfig(
        name=name,
        mixer=MIXERS[model_type],
        # Padding rows are not told apart there: all rows count, and none may be added.
        vocab_size=rows,
        pad_vocab_size_multiple=PREFERRED_MULTIPLE if rows % PREFERRED_MULTIPLE == 0 else 1,
        **{**fields, "expand": int(fields["expand"])},
    )


def _limits(values: dict[str, Any]) -> list[Any]:
    limits = values.get("time_step_limit") or NO_LIMIT
    return [limit.get("__float__") if isinstance(limit, dict) else limit for limit in limits]
