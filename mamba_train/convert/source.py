"""Weights from wherever they are: a run of ours, one of its checkpoints, a published folder, a name on the Hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from mamba_train.checkpoint import layout as checkpoint_layout
from mamba_train.checkpoint.storage import load_model_only, newest_complete
from mamba_train.config import ModelConfig
from mamba_train.convert import files
from mamba_train.convert.model_configs import detect_layout, from_config_json
from mamba_train.convert.names import from_layout
from mamba_train.run_folder import TOKENIZER

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a conversion reads; a repository may hold the same weights several times.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin"]

Log = Callable[[str], None]


@dataclass
class Pretrained:
    """Weights under our names (fp32, CPU), the resolved model config, and what came with them.

    tokenizer: contents of a tokenizer.json, None when there was none. run_config: the config of the run, empty for
    weights of others. step: of our checkpoint. origin: what the user named.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: str
    tokenizer: bytes | None = None
    run_config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None


def load_pretrained(source: str | Path, log: Log) -> Pretrained:
    """Open weights; `source` is a path or, if there is no such path, a name like `state-spaces/mamba-130m`.

    Raises ValueError, one line, when there is nothing there that our model could compute.
    """
    path = locate(source, log)
    if (path / checkpoint_layout.MANIFEST).is_file():
        return _from_checkpoint(path, str(source))
    if (path / checkpoint_layout.CHECKPOINTS).is_dir():
        newest = newest_complete(checkpoint_layout.checkpoints_dir(path), log)
        if newest is None:
            raise ValueError(f"{source}: the run has no complete checkpoint")
        return _from_checkpoint(newest, str(source))
    if (path / files.CONFIG_JSON).is_file():
        return _from_published(path, str(source))
    raise ValueError(
        f"{source}: expected a run (with {checkpoint_layout.CHECKPOINTS}/), a checkpoint "
        f"({checkpoint_layout.MANIFEST}) or published weights ({files.CONFIG_JSON})"
    )


def locate(source: str | Path, log: Log) -> Path:
    """The folder that `source` stands for, downloaded if need be; raises ValueError when there is none."""
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(str(source), log)
    if not path.is_dir():
        raise ValueError(f"{source}: a file; expected the folder of a run, of a checkpoint, or of published weights")
    return path


def _from_checkpoint(path: Path, origin: str) -> Pretrained:
    tensors, values = load_model_only(path)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"]))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: its model is of another version of the code, use that one ({reason})") from error
    assert isinstance(config, ModelConfig)
    return Pretrained(
        config=config,
        tensors=tensors,
        origin=origin,
        tokenizer=_run_tokenizer(path.resolve().parent.parent),
        run_config=values,
        step=checkpoint_layout.parse_step(path.resolve().name),
    )


def _run_tokenizer(run_dir: Path) -> bytes | None:
    path = run_dir / TOKENIZER  # not there when the checkpoint was moved out of its run
    return path.read_bytes() if path.is_file() else None


def _from_published(path: Path, origin: str) -> Pretrained:
    where = f"{origin}/{files.CONFIG_JSON}"
    values = files.read_json(path / files.CONFIG_JSON)
    layout = detect_layout(values, where)
    name = re.sub(r"[^\w.-]", "_", Path(origin).name) or "imported"
    config = from_config_json(values, layout, name, where)
    tensors = from_layout(files.read_weights(path), config, layout, origin)
    tokenizer = path / files.TOKENIZER
    return Pretrained(config, tensors, origin, tokenizer.read_bytes() if tokenizer.is_file() else None)


def _download(name: str, log: Log) -> Path:
    """A snapshot of a repository of the Hugging Face Hub, from the cache when it is there already."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{name}: there is no such path, and it is no name on the Hub (OWNER/NAME)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name}: there is no such path, and downloading needs huggingface_hub (pip install huggingface_hub)"
        ) from None
    log(f"{name} is no path here: taking it from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # many kinds: no network, no such name, no permission
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: there is no such path, and it could not be downloaded from the Hugging Face Hub ({reason}); "
            "download it where there is a network and give the folder"
        ) from None
