"""Save, verify, find and load checkpoints: each is complete or invisible (contract C4).

A checkpoint is written into a folder beside its final place, every file is flushed to the disk, the
manifest with all sizes and hashes comes last, and one rename makes it visible. Tensors are
safetensors files, the rest is JSON and YAML; nothing is pickled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mamba_train.checkpoint import layout
from mamba_train.checkpoint.disk import disk_became_full, fsync, is_disk_full, require_free_space
from mamba_train.checkpoint.folders import clean_up, publish, staging
from mamba_train.checkpoint.manifest import (
    DamagedCheckpoint,
    Manifest,
    describe_files,
    find_problems,
    read_manifest,
)
from mamba_train.checkpoint.tensors import check_tensors, read_tensors, total_bytes, write_tensors


@dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    `optimizer` is keyed `<parameter name>.exp_avg`, `.exp_avg_sq`, `.step`; `rng` as `rng.capture`
    returns it; `state` and `config` hold what JSON can (enums become their values); `fingerprints`
    are short texts that identify code, data and config.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def tensor_groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by the sub-folder that holds them."""
        return {layout.MODEL: self.model, layout.OPTIMIZER: self.optimizer, layout.RNG: self.rng}


def save(checkpoints_dir: Path, checkpoint: Checkpoint, *, reserve_gib: float) -> Path:
    """Write a checkpoint and return its folder; a folder of the same step is replaced.

    `reserve_gib` of disk space must stay free. Raises NotEnoughDiskSpace, before anything is written
    if it can be foreseen, with nothing left behind in any case; ValueError for a tensor or a value
    that cannot be stored. May run in a thread if nobody changes the tensors meanwhile.
    """
    checkpoints_dir = Path(checkpoints_dir)
    texts = _texts(checkpoint)
    for group, tensors in checkpoint.tensor_groups().items():
        check_tensors(group, tensors)
    tensor_bytes = sum(total_bytes(tensors) for tensors in checkpoint.tensor_groups().values())
    target = checkpoints_dir / layout.step_name(checkpoint.step)

    clean_up(checkpoints_dir)
    require_free_space(checkpoints_dir, tensor_bytes, reserve_gib)
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        with staging(checkpoints_dir, checkpoint.step) as staged:
            _write_files(staged, checkpoint, texts)
            manifest = Manifest(checkpoint.step, describe_files(staged), dict(checkpoint.fingerprints))
            _write_text(staged / layout.MANIFEST, manifest.to_text())
            publish(staged, target, checkpoint.step)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_became_full(checkpoints_dir, tensor_bytes, reserve_gib) from error
    return target


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    try:
        state = json.dumps(checkpoint.state, indent=1, allow_nan=False)
        # By way of JSON, which turns enums and tuples into what YAML can say too.
        config = json.loads(json.dumps(checkpoint.config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"state or config of step {checkpoint.step} is not plain JSON: {error}") from error
    return {
        layout.STATE: state + "\n",
        layout.CONFIG: yaml.safe_dump(config, sort_keys=False),
    }


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)


def _write_files(staged: Path, checkpoint: Checkpoint, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        _write_text(staged / name, text)
    mode = (staged / layout.STATE).stat().st_mode & 0o777
    for group, tensors in checkpoint.tensor_groups().items():
        (staged / group).mkdir()
        path = staged / group / layout.rank_file(0)
        write_tensors(path, tensors)
        path.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask says
        fsync(path)


def verify(path: Path) -> list[str]:
    """Problems of a checkpoint, one sentence each beginning with the file's name; empty when it is whole.

    Reads and hashes every byte of it.
    """
    return find_problems(Path(path))


def complete_steps(checkpoints_dir: Path) -> list[int]:
    """Steps whose checkpoint has a right manifest and right file sizes, newest first; hashes are not read."""
    folders = layout.step_folders(Path(checkpoints_dir))
    return [step for step, path in folders if not find_problems(path, with_hashes=False)]


def newest_complete(checkpoints_dir: Path, log: Callable[[str], None]) -> Path | None:
    """Newest checkpoint, by step number, of which every byte is right; None if there is none.

    Each damaged one that it passes over is reported to `log` in a line that names the files and the
    checkpoint used instead.
    """
    checkpoints_dir = Path(checkpoints_dir)
    clean_up(checkpoints_dir)
    damaged: list[tuple[Path, list[str]]] = []
    chosen: Path | None = None
    for _, path in layout.step_folders(checkpoints_dir):
        problems = verify(path)
        if not problems:
            chosen = path
            break
        damaged.append((path, problems))
    instead = f"{chosen.name} is used instead" if chosen else "there is no complete checkpoint to use instead"
    for path, problems in damaged:
        log(f"checkpoint {path} is damaged and is passed over ({'; '.join(problems)}); {instead}")
    return chosen


def _open(path: Path, wanted: Callable[[str], bool]) -> Manifest:
    problems = find_problems(path, wanted=wanted)
    if problems:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be loaded: {'; '.join(problems)}")
    return read_manifest(path)


def _read(path: Path, names: Sequence[str], device: str | torch.device) -> dict[str, Tensor]:
    try:
        return read_tensors([path / name for name in names], device)
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be loaded: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((path / layout.CONFIG).read_text(encoding="utf-8"))
    return config


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint, weights and optimiser onto `device`; raises DamagedCheckpoint naming the file."""
    path = Path(path)
    manifest = _open(path, wanted=lambda name: True)
    return Checkpoint(
        step=manifest.step,
        model=_read(path, manifest.files_in(layout.MODEL), device),
        optimizer=_read(path, manifest.files_in(layout.OPTIMIZER), device),
        rng=_read(path, [f"{layout.RNG}/{layout.rank_file(0)}"], "cpu"),
        state=json.loads((path / layout.STATE).read_text(encoding="utf-8")),
        config=_read_config(path),
        fingerprints=manifest.fingerprints,
    )


def load_model_only(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a checkpoint, for inference; raises DamagedCheckpoint naming the file."""
    path = Path(path)
    manifest = _open(path, wanted=lambda name: name == layout.CONFIG or name.startswith(f"{layout.MODEL}/"))
    return _read(path, manifest.files_in(layout.MODEL), device), _read_config(path)
