import pytest
import torch

from mamba_train.config import ModelConfig
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config


@pytest.fixture
def config() -> ModelConfig:
    """A small model whose sizes are all different, so that a swapped pair shows."""
    small = ModelConfig(name="test", n_layer=3, d_model=40, d_state=6, d_conv=4, pad_vocab_size_multiple=16)
    return resolve_model_config(small, tokenizer_vocab_size=53)


@pytest.fixture
def perturbed_model(config: ModelConfig) -> MambaLM:
    """A model with no weight at its initial value: a round trip cannot pass by leaving one out."""
    model = MambaLM(config)
    initialise_(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
