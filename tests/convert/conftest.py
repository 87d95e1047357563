from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mamba_train.checkpoint.storage import Checkpoint, save
from mamba_train.config import ModelConfig
from mamba_train.data.tokenizer import train_tokenizer
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config
from tests.convert.models import as_dict

VOCAB = 317  # of a vocabulary that needs padding


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def perturbed(config: ModelConfig, seed: int = 2) -> dict[str, Tensor]:
    """Weights none of which is at its initial value: a round trip cannot pass by leaving one out."""
    model = MambaLM(config)
    initialise_(model, config, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    return train_tokenizer(["some text to learn pieces from, and some more text"], 300).serialised


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, tokenizer_json: bytes) -> MakeRun:
    """Make the folder of a run with perturbed weights, as train.py would leave it."""

    def make(config: ModelConfig, name: str = "run") -> Path:
        run_dir = tmp_path / name
        config = resolve_model_config(config, VOCAB)
        checkpoint = Checkpoint(step=7, model=perturbed(config), config=as_dict(config))
        save(run_dir / "checkpoints", checkpoint, reserve_gib=0)
        (run_dir / "tokenizer.json").write_bytes(tokenizer_json)
        return run_dir

    return make
