"""The batch script of a small job, as its tests want it."""

from pathlib import Path

from slurm.script import render
from slurm.submit import compose_submission

BASE = ["experiment=smoke", "slurm.nodes=2", "slurm.gpus_per_node=2", "engine=ddp", "training.micro_batch_size=1"]


def script_of(tmp_path: Path, *overrides: str) -> str:
    return render(compose_submission([*BASE, "run_dir=run", *overrides], tmp_path))
