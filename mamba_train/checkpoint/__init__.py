"""Checkpoints that are complete or invisible, in one layout for every engine.

`layout` names things, `storage` saves and loads, `manifest` tells a whole checkpoint from a damaged
one, `folders` makes folders appear and disappear at once, `disk` speaks of free space, `retention`
decides what is deleted, `resume_policy` what may change when a run goes on, `rng` the random states.
"""

from mamba_train.checkpoint.disk import NotEnoughDiskSpace
from mamba_train.checkpoint.manifest import DamagedCheckpoint
from mamba_train.checkpoint.retention import apply_retention, steps_to_delete
from mamba_train.checkpoint.storage import (
    Checkpoint,
    complete_steps,
    load,
    load_model_only,
    newest_complete,
    save,
    verify,
)

__all__ = [
    "Checkpoint",
    "DamagedCheckpoint",
    "NotEnoughDiskSpace",
    "apply_retention",
    "complete_steps",
    "load",
    "load_model_only",
    "newest_complete",
    "save",
    "steps_to_delete",
    "verify",
]
