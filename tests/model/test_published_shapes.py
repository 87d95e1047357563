"""Every published model has its published number of parameters, counted without making it.

The counts follow from the shapes of the released weights (state-spaces on the Hugging Face Hub), tied
embedding counted once; `expected_parameters` derives them a second time, by hand.
"""

import pytest
import torch

from mamba_train.composition import compose_config
from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.model.language_model import MambaLM, padded_vocab_size, resolve_model_config
from mamba_train.model.selective_ssm import SelectiveSSM

N_PARAMETERS = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_2.7b": 2_702_599_680,
    "mamba2attn_2.7b": 2_697_590_880,
    "transformerpp_2.7b": 2_666_457_600,
    "transformerpp_130m": 123_575_040,
}


def published(name: str) -> ModelConfig:
    """With the tokenizer of all of them, GPT-NeoX's."""
    return resolve_model_config(compose_config([f"model={name}"]).model, tokenizer_vocab_size=50277)


def expected_parameters(name: str, config: ModelConfig) -> int:
    """The sum over the released tensors, from the published shapes alone."""
    rows = 50280 if name.startswith("mamba_") else 50288
    d, e = config.d_model, 2 * config.d_model
    mamba1 = d * 2 * e + e * 4 + e + e * (d // 16 + 32) + (d // 16) * e + e + e * 16 + e + e * d
    heads, conv = e // 64, e + 2 * 128
    mamba2 = d * (2 * e + 2 * 128 + heads) + conv * 4 + conv + 3 * heads + e + e * d
    attention = {"mamba2attn_2.7b": 4 * 2560 * 3840 + 3 * 3840 * 5}.get(name, 4 * d * d)
    mixers = {MixerKind.mamba1: mamba1, MixerKind.mamba2: mamba2, MixerKind.attention: attention}
    intermediate = {"transformerpp_2.7b": 6912, "transformerpp_130m": 2048}.get(name, 0)
    mlp = 3 * d * intermediate + d if intermediate else 0
    return rows * d + d + sum(mixers[kind] + d + mlp for kind in layer_mixers(config))


@pytest.mark.parametrize("name", N_PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    config = published(name)
    with torch.device("meta"):
        model = MambaLM(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == expected_parameters(name, config) == N_PARAMETERS[name]


def test_every_model_of_the_folder_is_published_or_tiny(repository) -> None:
    names = {path.stem for path in (repository / "conf" / "model").glob("*.yaml")}
    assert names == set(N_PARAMETERS) | {"mamba_tiny", "mamba2_tiny", "hybrid_tiny"}


def test_the_hybrid_attends_where_it_was_published_to() -> None:
    config = published("mamba2attn_2.7b")
    with torch.device("meta"):
        model = MambaLM(config)
    attends = [layer for layer, block in enumerate(model.blocks()) if not hasattr(block.mixer, "ssm")]
    assert attends == [9, 18, 27, 36, 45, 56]
    assert tuple(model.layers[9].mixer.in_proj.weight.shape) == (3 * 30 * 128, 2560)


@pytest.mark.parametrize(("name", "rows"), [("mamba_130m", 50280), ("mamba2_130m", 50288)])
def test_vocabulary_is_padded_as_released(name: str, rows: int) -> None:
    assert padded_vocab_size(published(name)) == rows


def test_only_the_ssm_modules_hold_ssm_parameters() -> None:
    """They are the units that an engine wraps with an fp32 policy."""
    from mamba_train.model.mamba2_ssm import Mamba2SSM

    for name in ("mamba_130m", "mamba2attn_2.7b"):
        with torch.device("meta"):
            model = MambaLM(published(name))
        owners = [m for m in model.modules() if any(n in m._parameters for n in ("A_log", "D", "dt_bias"))]
        assert owners
        assert all(isinstance(owner, SelectiveSSM | Mamba2SSM) for owner in owners)
