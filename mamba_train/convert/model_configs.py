"""The sizes of a model, in our `ModelConfig` and in the `config.json` of the published layouts.

A key that we do not know, or a value that our model cannot compute, is refused by name: a config that is read with
one of its lines left out would give other logits without a word.
"""

import math
from collections.abc import Mapping
from typing import Any

from mamba_train.config import ModelConfig
from mamba_train.convert.names import Layout
from mamba_train.model.language_model import padded_vocab_size

DEFAULT_EPS = 1e-5  # of every norm in mamba_ssm, whose config has no key for it
PREFERRED_MULTIPLE = 8


def to_config_json(config: ModelConfig, layout: Layout, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json for a resolved model config.

    eos_id: the end-of-document token, where there is a tokenizer.
    Raises ValueError for a model that the layout has no config for.
    """
    if layout is Layout.transformers:
        return _to_transformers(config, eos_id)
    return _to_state_spaces(config)


def from_config_json(values: Mapping[str, Any], layout: Layout, name: str, where: str) -> ModelConfig:
    """The resolved model config of a config.json; `where` names the file in messages.

    Raises ValueError naming the key for what our model cannot compute.
    """
    try:
        return (_from_transformers if layout is Layout.transformers else _from_state_spaces)(dict(values), name)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def detect_layout(values: Mapping[str, Any], where: str) -> Layout:
    """Which layout a config.json is of; raises ValueError for none of them."""
    model_type = values.get("model_type")
    if model_type in ("mamba", "mamba2"):
        return Layout.transformers
    if model_type is not None:
        raise ValueError(f"{where}: model_type={model_type} cannot be imported; expected mamba or mamba2")
    if "d_model" in values and "n_layer" in values:
        return Layout.state_spaces
    raise ValueError(f"{where}: neither of transformers (model_type) nor of mamba_ssm (d_model, n_layer)")


def _to_state_spaces(config: ModelConfig) -> dict[str, Any]:
    if config.norm_eps != DEFAULT_EPS:
        raise ValueError(
            f"model.norm_eps={config.norm_eps}: mamba_ssm computes with {DEFAULT_EPS} and has no key for another; "
            "use --layout transformers"
        )
    ssm_cfg = {
        "layer": "Mamba1",
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "dt_rank": config.dt_rank,
    }
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def _from_state_spaces(values: dict[str, Any], name: str) -> ModelConfig:
    ssm = dict(values.pop("ssm_cfg", {}))
    layer = ssm.pop("layer", "Mamba1")
    _require(values, rms_norm=True)
    for key in ("residual_in_fp32", "fused_add_norm"):  # precision and speed, not what is computed
        values.pop(key, None)
    if layer != "Mamba1":
        raise ValueError(f"ssm_cfg.layer={layer} cannot be imported; expected Mamba1")
    if values.pop("d_intermediate", 0) or values.pop("attn_layer_idx", []):
        raise ValueError("layers of attention or MLPs cannot be imported")
    values.pop("attn_cfg", None)
    _require(ssm, "ssm_cfg.", conv_bias=True, bias=False)
    d_model = values.pop("d_model")
    dt_rank = ssm.pop("dt_rank", "auto")
    for key in ("use_fast_path", "dt_init"):
        ssm.pop(key, None)
    config = ModelConfig(
        name=name,
        n_layer=values.pop("n_layer"),
        d_model=d_model,
        dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
        vocab_size=values.pop("vocab_size"),
        pad_vocab_size_multiple=values.pop("pad_vocab_size_multiple", 8),
        tie_embeddings=values.pop("tie_embeddings", True),
        **{key: ssm.pop(key) for key in _SAME_IN_STATE_SPACES if key in ssm},
    )
    _refuse_rest({**values, **{f"ssm_cfg.{key}": value for key, value in ssm.items()}})
    return config


_SAME_IN_STATE_SPACES = ("d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "dt_scale")

# Ours -> theirs, for keys whose values are the same.
_SAME_IN_TRANSFORMERS = {
    "n_layer": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}


def _to_transformers(config: ModelConfig, eos_id: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **{theirs: getattr(config, ours) for ours, theirs in _SAME_IN_TRANSFORMERS.items()},
        "intermediate_size": config.expand * config.d_model,
        "time_step_rank": config.dt_rank,
        "time_step_scale": config.dt_scale,
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


def _from_transformers(values: dict[str, Any], name: str) -> ModelConfig:
    if values["model_type"] != "mamba":
        raise ValueError(f"model_type={values['model_type']} cannot be imported; expected mamba")
    _require(values, use_bias=False, use_conv_bias=True, hidden_act="silu")
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        values[key]  # the defaults of a class are no description of these weights
    sizes = {ours: values[theirs] for ours, theirs in _SAME_IN_TRANSFORMERS.items() if theirs in values}
    d_model, rows = values["hidden_size"], values["vocab_size"]
    inner = values.get("intermediate_size", sizes.get("expand", 2) * d_model)
    if inner != sizes.get("expand", 2) * d_model:
        raise ValueError(f"intermediate_size={inner} cannot be imported; expected expand * hidden_size")
    dt_rank = values.get("time_step_rank", "auto")
    return ModelConfig(
        name=name,
        dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
        dt_scale=values.get("time_step_scale", 1.0),
        # Padding rows are not told apart there: all rows count, and none may be added.
        vocab_size=rows,
        pad_vocab_size_multiple=PREFERRED_MULTIPLE if rows % PREFERRED_MULTIPLE == 0 else 1,
        **sizes,
    )


def _require(values: dict[str, Any], prefix: str = "", **expected: Any) -> None:
    """Take the keys out of `values`; raise ValueError unless each has its expected value or is absent."""
    for key, wanted in expected.items():
        value = values.pop(key, wanted)
        if value != wanted:
            raise ValueError(f"{prefix}{key}={value} cannot be imported; expected {wanted}")


def _refuse_rest(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        raise ValueError(f"{key}={value}: this key is not known here, so the model it describes cannot be computed")
