"""A trained model and its tokenizer from a run folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf

from mamba_train.checkpoint.layout import checkpoints_dir
from mamba_train.checkpoint.storage import load_model_only, newest_complete
from mamba_train.config import ModelConfig
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from mamba_train.model.language_model import MambaLM
from mamba_train.run_folder import TOKENIZER


def load_model(run_dir: Path, device: torch.device, log: Callable[[str], None]) -> tuple[MambaLM, int]:
    """The model of the newest complete checkpoint of a run, and that checkpoint's step.

    Raises ValueError when the folder holds no complete checkpoint.
    """
    path = newest_complete(checkpoints_dir(run_dir), log)
    if path is None:
        raise ValueError(f"{run_dir}: no complete checkpoint here; expected the folder of a run (run_dir)")
    tensors, values = load_model_only(path, device)
    # Only the model's part: imported weights have no other.
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"]))
    assert isinstance(config, ModelConfig)
    model = _model_from(config, tensors)
    return model, int(path.name.split("_")[1])


def load_run_tokenizer(run_dir: Path) -> TextTokenizer:
    """The tokenizer that the run was trained with; raises ValueError when the folder has none."""
    path = run_dir / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{run_dir}: not the folder of a run (there is no {TOKENIZER}); give a run_dir of train.py")
    return load_tokenizer(path)


def _model_from(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> MambaLM:
    with torch.device("meta"):
        model = MambaLM(config)
    # assign: the checkpoint's tensors become the parameters, nothing is copied.
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()
