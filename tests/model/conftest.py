import pytest

from mamba_train.config import ModelConfig
from mamba_train.model.language_model import MambaLM
from tests.model.families import perturbed, small_config


@pytest.fixture
def config() -> ModelConfig:
    """A small Mamba-1 model whose sizes are all different, so that a swapped pair shows."""
    return small_config("mamba1")


@pytest.fixture
def perturbed_model(config: ModelConfig) -> MambaLM:
    """A model with no weight at its initial value: a round trip cannot pass by leaving one out."""
    return perturbed(config)
