"""What each of our parameters is called in the published layouts.

The tables hold one row per parameter of a kind of layer. Weights are moved, never computed with, so a round trip gives
back the same bits. A tied output matrix is no parameter of ours; the layouts that store it do so beside the tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.model.language_model import MambaLM


class Layout(StrEnum):
    """Who loads the folder."""

    transformers = "transformers"  # AutoModelForCausalLM: MambaForCausalLM, Mamba2ForCausalLM
    state_spaces = "state-spaces"  # mamba_ssm: MambaLMHeadModel.from_pretrained


HEAD = "lm_head.weight"
EMBEDDING = {Layout.transformers: "backbone.embeddings.weight", Layout.state_spaces: "backbone.embedding.weight"}

# Ours -> theirs, the same in both layouts. A convolution's weight has an axis for its single input channel there.
OUTSIDE_THE_LAYERS = {"norm.weight": "backbone.norm_f.weight", "lm_head.weight": HEAD}
IN_EVERY_LAYER = {
    "norm.weight": "norm.weight",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mlp_norm.weight": "norm2.weight",
    "mlp.in_proj.weight": "mlp.fc1.weight",
    "mlp.out_proj.weight": "mlp.fc2.weight",
}
IN_AN_SSM = {
    "mixer.ssm.conv_weight": "mixer.conv1d.weight",
    "mixer.ssm.conv_bias": "mixer.conv1d.bias",
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
}
IN_A_LAYER: dict[MixerKind, dict[str, str]] = {
    MixerKind.mamba1: {
        **IN_EVERY_LAYER,
        **IN_AN_SSM,
        "mixer.ssm.x_proj_weight": "mixer.x_proj.weight",
        "mixer.ssm.dt_proj_weight": "mixer.dt_proj.weight",
        "mixer.ssm.dt_bias": "mixer.dt_proj.bias",
    },
    # The rows of in_proj are z, x, B, C, Δ, and the channels of the convolution x, B, C, there as here.
    MixerKind.mamba2: {
        **IN_EVERY_LAYER,
        **IN_AN_SSM,
        "mixer.ssm.dt_bias": "mixer.dt_bias",
        "mixer.ssm.norm_weight": "mixer.norm.weight",
    },
    # The rows of in_proj are queries, keys, values.
    MixerKind.attention: {
        **IN_EVERY_LAYER,
        "mixer.conv_weight": "mixer.conv1d.weight",
        "mixer.conv_bias": "mixer.conv1d.bias",
    },
}
WITH_CHANNEL_AXIS = "conv1d.weight"


@dataclass(frozen=True)
class Counterpart:
    """One of our parameters: its name and shape here, its name there."""

    ours: str
    shape: tuple[int, ...]
    theirs: str

    @property
    def their_shape(self) -> tuple[int, ...]:
        if self.theirs.endswith(WITH_CHANNEL_AXIS):
            channels, width = self.shape
            return (channels, 1, width)
        return self.shape


def counterparts(config: ModelConfig, layout: Layout) -> list[Counterpart]:
    """Every parameter of the model that `config` (resolved) describes, with its name in `layout`.

    Raises KeyError for a parameter that no table has: a new kind of layer needs its rows here.
    """
    with torch.device("meta"):
        model = MambaLM(config)
    mixers = layer_mixers(config)
    return [
        Counterpart(name, tuple(parameter.shape), _their_name(name, mixers, layout))
        for name, parameter in model.named_parameters()
    ]


def _their_name(name: str, mixers: Sequence[MixerKind], layout: Layout) -> str:
    if name == "embedding.weight":
        return EMBEDDING[layout]
    if name in OUTSIDE_THE_LAYERS:
        return OUTSIDE_THE_LAYERS[name]
    _, layer, rest = name.split(".", 2)
    return f"backbone.layers.{layer}.{IN_A_LAYER[mixers[int(layer)]][rest]}"


def to_layout(tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Our weights under their names, with a tied output matrix where the layout's files have one."""
    renamed = {row.theirs: tensors[row.ours].reshape(row.their_shape) for row in counterparts(config, layout)}
    if config.tie_embeddings and layout is Layout.state_spaces:
        renamed[HEAD] = renamed[EMBEDDING[layout]]
    return renamed


def from_layout(
    tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout, where: str = "the weights"
) -> dict[str, Tensor]:
    """Their weights under our names, fp32 masters.

    Raises ValueError, one line with the first name and the count, when names are missing, unexpected or of another
    shape than the config says, or when a matrix that should be tied is not.
    """
    found = dict(tensors)
    for other in EMBEDDING.values():  # transformers reads both spellings
        if other in found:
            found[EMBEDDING[layout]] = found.pop(other)
    for name, tensor in found.items():
        # Checked before anything is cast: complex or whole numbers would become fp32 without a word.
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ValueError(f"{where}: '{name}' holds {tensor.dtype} ({tensor.layout}), expected floating point")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: '{name}' holds values that are not finite")
    rows = counterparts(config, layout)
    head = found.pop(HEAD, None) if config.tie_embeddings else None
    check_shapes(
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {row.theirs: row.their_shape for row in rows},
        where,
    )
    if head is not None and not torch.equal(head, found[EMBEDDING[layout]]):
        raise ValueError(f"{where}: the config ties {HEAD} to {EMBEDDING[layout]}, and the two differ")
    return {row.ours: found[row.theirs].reshape(row.shape).to(torch.float32).contiguous() for row in rows}


def check_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str, remedy: str = ""
) -> None:
    """Raise ValueError, in one line, unless names and shapes are those expected."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    problems = []
    if missing:
        problems.append(f"{_count(missing, 'is', 'are')} missing, first '{missing[0]}'")
    if unexpected:
        problems.append(f"{_count(unexpected, 'is', 'are')} unexpected, first '{unexpected[0]}'")
    if wrong:
        first = wrong[0]
        problems.append(
            f"{_count(wrong, 'has', 'have')} another shape, first '{first}': "
            f"{tuple(found[first])} instead of {tuple(expected[first])}"
        )
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)} (of {len(expected)} weights expected){remedy}")


def n_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied matrix counted once."""
    return sum(math.prod(row.shape) for row in counterparts(config, Layout.state_spaces))


def _count(names: Sequence[str], singular: str, plural: str) -> str:
    return f"{len(names)} weight{'' if len(names) == 1 else 's'} {singular if len(names) == 1 else plural}"
