"""Save, verify, find and load checkpoints: each is complete or invisible (contract C4).

A checkpoint is written into a folder beside its final place, every file is flushed to the disk, the
manifest with all sizes and hashes comes last, and one rename makes it visible. Tensors are
safetensors files, the rest is JSON and YAML; nothing is pickled. `save` does it from one process; `saving.Saver`
from all ranks of a run, while it trains on, with the steps that are here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    FileRecord,
    Manifest,
    describe_files,
    find_problems,
    read_manifest,
)
from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.checkpoint.tensors import (
    check_tensors,
    read_pieces,
    read_tensors,
    tensor_shapes,
    total_bytes,
    write_pieces,
)


@dataclass
class Record:
    """What a checkpoint holds besides tensors.

    `state` and `config` hold what JSON can (enums become their values); `fingerprints` are short texts that identify
    code, data and config.
    """

    step: int
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped, with whole tensors.

    `optimizer` is keyed `<parameter name>.exp_avg`, `.exp_avg_sq`, `.step`; `rng` as `rng.capture`
    returns it; the rest as in `Record`.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Record:
        return Record(self.step, self.state, self.config, self.fingerprints)

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
    record = checkpoint.record
    texts = record_texts(record)
    for group, tensors in checkpoint.tensor_groups().items():
        check_tensors(group, tensors)
    tensor_bytes = sum(total_bytes(tensors) for tensors in checkpoint.tensor_groups().values())

    clean_up(checkpoints_dir)
    require_free_space(checkpoints_dir, tensor_bytes, reserve_gib)
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        with staging(checkpoints_dir, record.step) as staged:
            pieces = Pieces.whole(checkpoint.model, checkpoint.optimizer)
            files = write_rank_files(staged, 0, pieces, checkpoint.rng)
            return finish(staged, checkpoints_dir, record, texts, files)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_became_full(checkpoints_dir, tensor_bytes, reserve_gib) from error


def record_texts(record: Record) -> dict[str, str]:
    """The text files of a checkpoint by their names; raises ValueError for what JSON cannot say."""
    try:
        state = json.dumps(record.state, indent=1, allow_nan=False)
        # By way of JSON, which turns enums and tuples into what YAML can say too.
        config = json.loads(json.dumps(record.config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"state or config of step {record.step} is not plain JSON: {error}") from error
    return {
        layout.STATE: state + "\n",
        layout.CONFIG: yaml.safe_dump(config, sort_keys=False),
    }


def write_rank_files(staged: Path, rank: int, pieces: Pieces, rng: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    """Write and flush the tensors of one rank into the folder of a save; returns sizes and hashes for the manifest."""
    groups = {
        layout.MODEL: pieces.model,
        layout.OPTIMIZER: pieces.optimizer,
        layout.RNG: {name: Piece.whole(tensor) for name, tensor in rng.items()},
    }
    paths = []
    for group, parts in groups.items():
        (staged / group).mkdir(exist_ok=True)
        paths += write_pieces(staged / group, rank, parts)
    mode = staged.stat().st_mode & 0o666
    for path in paths:
        path.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask says
        fsync(path)
    return describe_files(staged, paths)


def finish(
    staged: Path, checkpoints_dir: Path, record: Record, texts: Mapping[str, str], files: Mapping[str, FileRecord]
) -> Path:
    """The last part of a save, when the tensors of all ranks are there: text files, manifest, the rename."""
    for name, text in texts.items():
        _write_text(staged / name, text)
    files = {**files, **describe_files(staged, [staged / name for name in texts])}
    manifest = Manifest(record.step, files, dict(record.fingerprints))
    _write_text(staged / layout.MANIFEST, manifest.to_text())
    target = checkpoints_dir / layout.step_name(record.step)
    publish(staged, target, record.step)
    return target


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
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


def _files(path: Path, manifest: Manifest, group: str) -> list[Path]:
    return [path / name for name in manifest.files_in(group)]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be loaded: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((path / layout.CONFIG).read_text(encoding="utf-8"))
    return config


def read_record(path: Path) -> Record:
    """What a checkpoint holds besides tensors; raises DamagedCheckpoint naming the file."""
    path = Path(path)
    manifest = _open(path, wanted=lambda name: name in (layout.CONFIG, layout.STATE))
    state = json.loads((path / layout.STATE).read_text(encoding="utf-8"))
    return Record(manifest.step, state, _read_config(path), manifest.fingerprints)


def model_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a checkpoint, from the headers of its files."""
    path = Path(path)
    with _damage_named(path):
        return tensor_shapes(_files(path, read_manifest(path), layout.MODEL))


def load_pieces(path: Path, pieces: Pieces) -> None:
    """Fill what one rank holds from a checkpoint that any engine on any number of ranks wrote.

    Its bytes are not verified: `newest_complete`, which one rank calls for all, has done that. Raises
    DamagedCheckpoint when a tensor is missing or has another shape.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with _damage_named(path):
        read_pieces(_files(path, manifest, layout.MODEL), pieces.model)
        read_pieces(_files(path, manifest, layout.OPTIMIZER), pieces.optimizer)


def load_rng(path: Path, rank: int) -> dict[str, Tensor]:
    """The random states that this rank saved; empty when the checkpoint was written by fewer ranks."""
    file = Path(path) / layout.RNG / layout.rank_file(rank)
    if f"{layout.RNG}/{file.name}" not in read_manifest(Path(path)).files:
        return {}
    with _damage_named(Path(path)):
        return read_tensors([file])


def load(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint whole, weights and optimiser onto `device`; raises DamagedCheckpoint naming the file."""
    path = Path(path)
    manifest = _open(path, wanted=lambda name: True)
    record = read_record(path)
    with _damage_named(path):
        return Checkpoint(
            step=record.step,
            model=read_tensors(_files(path, manifest, layout.MODEL), device),
            optimizer=read_tensors(_files(path, manifest, layout.OPTIMIZER), device),
            rng=load_rng(path, 0),
            state=record.state,
            config=record.config,
            fingerprints=record.fingerprints,
        )


def load_model_only(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a checkpoint, for inference; raises DamagedCheckpoint naming the file."""
    path = Path(path)
    manifest = _open(path, wanted=lambda name: name == layout.CONFIG or name.startswith(f"{layout.MODEL}/"))
    with _damage_named(path):
        return read_tensors(_files(path, manifest, layout.MODEL), device), _read_config(path)
