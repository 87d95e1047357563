"""Every name in a checkpoint, in one place.

    run_dir/checkpoints/step_00000500/
        manifest.json               sizes and hashes of all the other files; written last
        model/*.safetensors         one tensor per parameter name
        optimizer/*.safetensors     `<parameter name>.exp_avg`, `.exp_avg_sq`, `.step`
        rng/rank_00000.safetensors  random states of one rank
        state.json                  step, data position, ledger, wandb run id, ...
        config.yaml                 the composed configuration

`model/` and `optimizer/` may hold any number of files: each rank writes what it holds, a block of a tensor in each
file, with its place in the header. A folder that is being written, replaced or deleted lies beside the checkpoints
under a name that begins with what is happening to it and says which process does it:
`writing.step_00000500.HOST.PID.TOKEN`.
"""

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
MODEL = "model"
OPTIMIZER = "optimizer"
RNG = "rng"
STATE = "state.json"
CONFIG = "config.yaml"

WRITING = "writing"
REPLACED = "replaced"
DELETED = "deleted"

_STEP = re.compile(r"step_([0-9]{8,})")
_ASIDE = re.compile(rf"({WRITING}|{REPLACED}|{DELETED})\.(step_[0-9]+)\.(.+)\.([0-9]+)\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Aside:
    """What the name of a folder that is no checkpoint says."""

    purpose: str
    step: int
    host: str
    pid: int


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Folder of a run that holds its checkpoints."""
    return Path(run_dir) / CHECKPOINTS


def rank_file(rank: int, part: int = 0) -> str:
    """Name of the tensor file that a rank writes in each of the sub-folders; part: see `tensors.write_pieces`."""
    return f"rank_{rank:05d}.safetensors" if part == 0 else f"rank_{rank:05d}.part_{part}.safetensors"


def step_name(step: int) -> str:
    """Name of the folder of the checkpoint taken after `step` optimiser steps."""
    if step < 0:
        raise ValueError(f"a checkpoint's step must be 0 or more, got {step}")
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """Step of a checkpoint folder's name, or None if the name is not exactly one that `step_name` gives."""
    match = _STEP.fullmatch(name)
    if match is None:
        return None
    step = int(match.group(1))
    return step if step_name(step) == name else None


def step_folders(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    """Folders named like a checkpoint, whatever their state, by step, newest first."""
    if not checkpoints_dir.is_dir():
        return []
    found = ((parse_step(path.name), path) for path in checkpoints_dir.iterdir())
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def aside_name(purpose: str, step: int) -> str:
    """A new name, never used before, for a folder that this process writes, replaces or deletes."""
    return f"{purpose}.{step_name(step)}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


def parse_aside(name: str) -> Aside | None:
    """Parts of a name that `aside_name` gave, or None for any other name."""
    match = _ASIDE.fullmatch(name)
    if match is None:
        return None
    purpose, step_text, host, pid = match.groups()
    step = parse_step(step_text)
    return None if step is None else Aside(purpose, step, host, int(pid))
