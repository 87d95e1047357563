"""config.json of mamba_ssm's `MambaLMHeadModel`: pure models, hybrids with attention, and Transformer++."""

import math
from typing import Any

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.convert.require import refuse_rest, require

DEFAULT_EPS = 1e-5  # of every norm there; the config has no key for it
MLP_MULTIPLE = 128  # the width of an MLP is rounded up to this there

LAYERS = {"Mamba1": MixerKind.mamba1, "Mamba2": MixerKind.mamba2}
# Ours -> theirs in ssm_cfg, and what holds there when the key is absent.
SSM_KEYS: dict[MixerKind, dict[str, tuple[str, Any]]] = {
    MixerKind.mamba1: {
        "d_state": ("d_state", 16),
        "d_conv": ("d_conv", 4),
        "expand": ("expand", 2),
        "dt_rank": ("dt_rank", "auto"),
        "dt_scale": ("dt_scale", 1.0),
    },
    MixerKind.mamba2: {
        "d_state": ("d_state", 128),
        "d_conv": ("d_conv", 4),
        "expand": ("expand", 2),
        "head_dim": ("headdim", 64),
        "n_groups": ("ngroups", 1),
        "chunk_size": ("chunk_size", 256),
    },
}
INITIAL_KEYS = ("dt_min", "dt_max", "dt_init_floor")  # of both kinds: how weights were drawn


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json; raises ValueError for what mamba_ssm has no key for."""
    if config.norm_eps != DEFAULT_EPS:
        raise ValueError(
            f"model.norm_eps={config.norm_eps}: mamba_ssm computes with {DEFAULT_EPS} and has no key for another"
        )
    if config.d_intermediate % MLP_MULTIPLE:
        raise ValueError(
            f"model.d_intermediate={config.d_intermediate}: mamba_ssm rounds it up to a multiple of {MLP_MULTIPLE}, "
            "and these weights would not fit"
        )
    mixers = layer_mixers(config)
    ssm_cfg: dict[str, Any] = {}
    if config.mixer is not MixerKind.attention:
        ssm_cfg["layer"] = next(name for name, mixer in LAYERS.items() if mixer is config.mixer)
        ssm_cfg |= {theirs: getattr(config, ours) for ours, (theirs, _) in SSM_KEYS[config.mixer].items()}
        ssm_cfg |= {key: getattr(config, key) for key in INITIAL_KEYS}
        if config.mixer is MixerKind.mamba2:
            ssm_cfg["A_init_range"] = [config.A_init_min, config.A_init_max]
    attention = [layer for layer, mixer in enumerate(mixers) if mixer is MixerKind.attention]
    return {
        "d_model": config.d_model,
        "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": attention,
        "attn_cfg": _attention_to_json(config) if attention else {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def from_json(values: dict[str, Any], name: str) -> ModelConfig:
    """The model config of a config.json, whose contents are used up.

    Raises KeyError for a missing key, ValueError naming the key for what our model cannot compute.
    """
    require(values, rms_norm=True)
    for key in ("residual_in_fp32", "fused_add_norm"):  # precision and speed, not what is computed
        values.pop(key, None)
    n_layer = values.pop("n_layer")
    attention = sorted(values.pop("attn_layer_idx", None) or [])
    attn_cfg, ssm_cfg = dict(values.pop("attn_cfg", None) or {}), dict(values.pop("ssm_cfg", None) or {})
    fields: dict[str, Any] = {}
    if attention == list(range(n_layer)):
        fields |= {"mixer": MixerKind.attention}
    else:
        fields |= {"attention_layers": attention} | _ssm_from_json(ssm_cfg)
    if attention:
        fields |= _attention_from_json(attn_cfg)
    d_intermediate = values.pop("d_intermediate", 0)
    config = ModelConfig(
        name=name,
        n_layer=n_layer,
        d_model=values.pop("d_model"),
        d_intermediate=math.ceil(d_intermediate / MLP_MULTIPLE) * MLP_MULTIPLE,
        vocab_size=values.pop("vocab_size"),
        pad_vocab_size_multiple=values.pop("pad_vocab_size_multiple", 8),
        tie_embeddings=values.pop("tie_embeddings", True),
        norm_eps=DEFAULT_EPS,
        **fields,
    )
    refuse_rest(values)
    return config


def _ssm_from_json(ssm: dict[str, Any]) -> dict[str, Any]:
    layer = ssm.pop("layer", "Mamba1")
    if layer not in LAYERS:
        raise ValueError(f"ssm_cfg.layer={layer} cannot be imported; expected {' or '.join(LAYERS)}")
    mixer = LAYERS[layer]
    require(ssm, "ssm_cfg.", bias=False, conv_bias=True)
    fields: dict[str, Any] = {"mixer": mixer}
    fields |= {ours: ssm.pop(theirs, default) for ours, (theirs, default) in SSM_KEYS[mixer].items()}
    fields |= {key: ssm.pop(key) for key in INITIAL_KEYS if key in ssm}
    if mixer is MixerKind.mamba1:
        if fields["dt_rank"] == "auto":
            fields["dt_rank"] = None
        for key in ("dt_init", "use_fast_path"):  # how weights were drawn, how fast they are computed with
            ssm.pop(key, None)
    else:
        unlimited = [0.0, float("inf")]
        require(ssm, "ssm_cfg.", d_ssm=None, D_has_hdim=False, rmsnorm=True, norm_before_gate=False)
        if list(ssm.pop("dt_limit", unlimited)) != unlimited:
            raise ValueError("ssm_cfg.dt_limit cannot be imported; expected no limit")
        fields["A_init_min"], fields["A_init_max"] = map(float, ssm.pop("A_init_range", (1, 16)))
        for key in ("conv_init", "use_mem_eff_path"):
            ssm.pop(key, None)
    refuse_rest(ssm, "ssm_cfg.")
    return fields


def _attention_to_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "causal": True,
        "d_conv": config.attention_d_conv,
        "head_dim": config.attention_head_dim,
        "num_heads": config.attention_heads,
        "num_heads_kv": config.attention_kv_heads,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": config.rotary_dim,
    }


def _attention_from_json(attention: dict[str, Any]) -> dict[str, Any]:
    require(attention, "attn_cfg.", causal=True, mlp_dim=0, softmax_scale=None)
    require(attention, "attn_cfg.", rotary_emb_base=10000.0, rotary_emb_interleaved=False)
    for key in ("qkv_proj_bias", "out_proj_bias"):
        if attention.pop(key, True):
            raise ValueError(f"attn_cfg.{key}=True cannot be imported (it is the default there); expected False")
    fields = {
        "attention_heads": attention.pop("num_heads"),
        "attention_kv_heads": attention.pop("num_heads_kv", None),
        "attention_head_dim": attention.pop("head_dim", None),
        "attention_d_conv": attention.pop("d_conv", 0),
        "rotary_dim": attention.pop("rotary_emb_dim", 0),
    }
    refuse_rest(attention, "attn_cfg.")
    return fields
