"""The sizes of a model, in our `ModelConfig` and in the `config.json` of the published layouts.

A key that we do not know, or a value that our model cannot compute, is refused by name: a config that is read with
one of its lines left out would give other logits without a word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mamba_train.config import MixerKind, ModelConfig
from mamba_train.convert import state_spaces, transformers_layout
from mamba_train.convert.names import Layout
from mamba_train.model.language_model import resolve_model_config

# Our names of what must be a positive whole number in any model.
SIZES = (
    *("n_layer", "d_model", "d_state", "d_conv", "expand", "head_dim", "n_groups", "chunk_size"),
    *("vocab_size", "pad_vocab_size_multiple"),
)


def to_config_json(config: ModelConfig, layout: Layout, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json for a resolved model config.

    eos_id: the end-of-document token, where there is a tokenizer.
    Raises ValueError for a model that the layout has no config for.
    """
    if config.time_invariant:
        raise ValueError("model.time_invariant=true: others have no model whose Δ, B and C depend on no token")
    if layout is Layout.transformers:
        return transformers_layout.to_json(config, eos_id)
    return state_spaces.to_json(config)


def from_config_json(values: Mapping[str, Any], layout: Layout, name: str, where: str) -> ModelConfig:
    """The resolved model config of a config.json; `where` names the file in messages.

    Raises ValueError naming the key for what our model cannot compute.
    """
    read = transformers_layout.from_json if layout is Layout.transformers else state_spaces.from_json
    try:
        config = _typed(read(dict(values), name))
        assert config.vocab_size is not None
        return resolve_model_config(config, config.vocab_size)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing") from None
    except (TypeError, AttributeError, ZeroDivisionError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{where}: a value in it has the wrong type or is 0 where a size is needed ({reason})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(config: ModelConfig) -> ModelConfig:
    """The same config with every value of its field's type; what JSON held may have been anything."""
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), dataclasses.asdict(config)))
    assert isinstance(typed, ModelConfig)
    for key in SIZES:
        if getattr(typed, key) is None or getattr(typed, key) < 1:
            raise ValueError(f"{key}={getattr(typed, key)}: expected at least 1")
    for layer in typed.attention_layers:
        if not 0 <= layer < typed.n_layer:
            raise ValueError(f"attention layer {layer}: the model has layers 0 to {typed.n_layer - 1}")
    return typed


def detect_layout(values: Mapping[str, Any], where: str) -> Layout:
    """Which layout a config.json is of; raises ValueError for none of them."""
    model_type = values.get("model_type")
    if model_type in transformers_layout.MIXERS:
        return Layout.transformers
    if model_type is not None:
        expected = " or ".join(transformers_layout.MIXERS)
        raise ValueError(f"{where}: model_type={model_type} cannot be imported; expected {expected}")
    if "d_model" in values and "n_layer" in values:
        return Layout.state_spaces
    raise ValueError(f"{where}: neither of transformers (model_type) nor of mamba_ssm (d_model, n_layer)")


def has_grouped_norm(config: ModelConfig) -> bool:
    """Whether the gated norm is one of several groups, which some releases of transformers do not know."""
    return config.mixer is MixerKind.mamba2 and config.n_groups > 1
