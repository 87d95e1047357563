"""train.py with faults inside, of `plan.json` in the run folder's parent: one rank of a chaos run, under torchrun.

Faults of numbers belong to a step and come again when the step is done again; a disk that is full and a tracker that
breaks happen once.
"""

import errno
import json
import math
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from mamba_train.checkpoint import saving
from mamba_train.ranks import launch
from mamba_train.training.trainer import Trainer
from tests.helpers import REPOSITORY

STEP_SECONDS = 0.03  # so that whoever disturbs the run from outside meets it at about the step that was meant

run_dir = Path(next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("run_dir=")))
plan = json.loads((run_dir.parent / "plan.json").read_text())
FACTORS = {"nan": math.nan, "stretch": math.nan, "spike": 1e3}


def once(event: dict[str, Any]) -> bool:
    """Whether this is the first time that it happens."""
    try:
        os.close(os.open(run_dir.parent / f"done_{event['kind']}_{event['step']}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def factor_of(step: int) -> float:
    """What the loss is multiplied by before the backward pass of this rank."""
    for event in plan:
        n_steps = 3 if event["kind"] == "stretch" else 1
        is_now = event["step"] <= step < event["step"] + n_steps
        if event["kind"] in FACTORS and is_now and event["rank"] == launch().rank:
            return FACTORS[event["kind"]]
    return 1.0


def add_faults(trainer: Trainer) -> None:
    backward = trainer.engine.backward

    def faulty(loss: Any) -> None:
        time.sleep(STEP_SECONDS)
        factor = factor_of(trainer.state.step + 1)
        backward(loss if factor == 1.0 else loss * factor)

    trainer.engine.backward = faulty  # type: ignore[method-assign]


def fill_the_disk() -> None:
    write = saving.write_rank_files

    def failing(staged: Path, rank: int, *args: Any) -> Any:
        for event in plan:
            due = event["kind"] == "full disk" and f"{event['step']:08d}" in staged.name
            if due and event["rank"] == rank and once(event):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(staged, rank, *args)

    saving.write_rank_files = failing


class BrokenTracker:
    """In the place of the module wandb: it takes records, until the planned step."""

    step, url = 0, ""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def log(self, record: dict[str, Any], **kwargs: Any) -> None:
        for event in plan:
            if event["kind"] == "tracker" and record["step"] >= event["step"] and once(event):
                raise ConnectionError("the tracker is gone")


sys.modules["wandb"] = BrokenTracker()  # type: ignore[assignment]
fill_the_disk()
run = Trainer.run


def run_with_faults(trainer: Trainer) -> None:
    add_faults(trainer)
    run(trainer)


Trainer.run = run_with_faults  # type: ignore[method-assign]
sys.argv[0] = str(REPOSITORY / "train.py")
runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
