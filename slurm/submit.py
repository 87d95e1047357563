"""`python -m slurm.submit [--dry-run] [OVERRIDE ...]`: check a config, plan it, and queue it as a job that comes back.

The overrides are those of train.py, with slurm.nodes and the other slurm.* keys. A key with several values
(optim.lr=1e-3,2e-3) makes a job array with one run for each combination, each in a folder of its own.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from mamba_train import run_folder
from mamba_train.composition import CONF_DIR, compose_config, explain, user_errors_exit
from mamba_train.config import Config, EngineKind
from slurm.script import Run, Submission, render, tasks_per_node

REPOSITORY = CONF_DIR.parent
CODE = ("train.py", "conf", "kernels", "mamba_train", "slurm")
JOB = "job.json"  # in the folder of a submission: the job's id


def main() -> None:
    """Parse the command line and submit; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m slurm.submit", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for train.py; slurm.nodes=2 slurm.time=8:00:00"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file and stop")
    args = parser.parse_intermixed_args()
    with user_errors_exit():
        submission = compose_submission(args.overrides, Path.cwd())
        if args.dry_run:
            print(render(submission), end="")
            return
        refuse_second_job(submission)
        plan(submission)
        write(submission)
        announce(submission, sbatch(submission))


def compose_submission(overrides: list[str], working_dir: Path) -> Submission:
    """Compose and check every run; raises ValueError, one line, for the first thing that cannot work."""
    site = os.environ.get("MAMBA_TRAIN_SITE")
    if site and not any(override.startswith("slurm=") for override in overrides):
        overrides = [f"slurm={site}", *overrides]  # the job may not see this variable
    combinations = sweep(overrides)
    configs = [compose_config(combination) for combination in combinations]
    run_dirs = [config.run_dir for config in configs]
    if len(set(run_dirs)) < len(run_dirs):  # nothing that is swept is in the name
        for number, swept in enumerate(swept_values(overrides)):
            name = re.sub(r"[^\w.+-]", "-", "_".join(swept))  # optim.lr-0.001_seed-0
            run_dir = str(Path(run_dirs[number]) / name)
            combinations[number] = [*combinations[number], f"run_dir={quoted(run_dir)}"]
            configs[number].run_dir = run_dir
    runs = [
        Run(working_dir / config.run_dir, combination, config)
        for config, combination in zip(configs, combinations, strict=True)
    ]
    for run in runs:
        check(run.config)
    root = Path(os.path.commonpath([run.run_dir for run in runs]))
    log_dir = root / run_folder.SLURM
    number = 1
    while (folder := log_dir / f"submission-{number:03d}").exists():
        number += 1
    return Submission(runs, folder, log_dir, working_dir)


def sweep(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run: every combination of the keys that have several values."""
    fixed = [str(override.input_line) for override in _parse(overrides) if not override.is_sweep_override()]
    return [[*fixed, *swept] for swept in swept_values(overrides)]


def swept_values(overrides: list[str]) -> list[tuple[str, ...]]:
    """The overrides in which the runs differ; one empty tuple when nothing is swept."""
    sweeps = [override for override in _parse(overrides) if override.is_sweep_override()]
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()] for override in sweeps
    ]
    return list(itertools.product(*choices))


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(explain(error)) from error


def quoted(text: str) -> str:
    """As a value of a Hydra override."""
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def check(config: Config) -> None:
    """What only matters for a job on a cluster."""
    slurm, training = config.slurm, config.training
    if slurm.nodes is None:
        raise ValueError("slurm.nodes has no value; give the number of nodes: slurm.nodes=1")
    n_ranks = slurm.nodes * tasks_per_node(slurm)
    if config.engine.name is EngineKind.single and n_ranks > 1:
        raise ValueError(
            f"engine.name=single: it trains on one device, and slurm.nodes={slurm.nodes} with slurm.gpus_per_node="
            f"{slurm.gpus_per_node} starts {n_ranks} processes; choose another engine, or one node and one GPU"
        )
    if training.global_batch_size % (n_ranks * training.micro_batch_size):
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size}: expected a multiple of {n_ranks} processes "
            f"times training.micro_batch_size ({training.micro_batch_size})"
        )
    if not config.checkpoint.resume:
        raise ValueError(
            "checkpoint.resume=False: a job that comes back would start over each time; choose another run_dir instead"
        )


def refuse_second_job(submission: Submission) -> None:
    """Raise ValueError when an earlier job of a run is still in the queue."""
    for folder in sorted(submission.log_dir.glob("submission-*")):
        if not (folder / JOB).is_file():
            continue
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))["job"]
        queued = subprocess.run(["squeue", "--noheader", "--job", job], capture_output=True, text=True)
        if queued.returncode == 0 and queued.stdout.strip():
            raise ValueError(
                f"run_dir={submission.log_dir.parent}: job {job} is still in the queue and comes back by itself; "
                f"wait for it, scancel {job}, or choose another run_dir"
            )


def plan(submission: Submission) -> None:
    """Print the plan of the first run; a config that cannot be planned is not submitted."""
    command = [sys.executable, "-m", "mamba_train", "plan", "--device", submission.slurm.gpu]
    command += submission.runs[0].overrides
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=submission.working_dir, env=environment)
    if result.returncode:
        sys.exit(result.returncode)


def write(submission: Submission) -> None:
    """Put code, configs and the script into the folder of the submission: a requeued job runs what is there."""
    submission.code.mkdir(parents=True)
    for name in CODE:
        source, target = REPOSITORY / name, submission.code / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    for index, run in enumerate(submission.runs):
        name = f"config-{index}.yaml" if submission.is_array else "config.yaml"
        OmegaConf.save(OmegaConf.structured(run.config), submission.folder / name)
        run.run_dir.mkdir(parents=True, exist_ok=True)
    submission.script.write_text(render(submission), encoding="utf-8")


def sbatch(submission: Submission) -> str:
    """Queue the script and return the job's id; raises ValueError with what sbatch said if it refused."""
    if shutil.which("sbatch") is None:
        raise ValueError(f"sbatch is not on the path of this machine; the script is ready: sbatch {submission.script}")
    result = subprocess.run(["sbatch", "--parsable", str(submission.script)], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(submission.folder)
        raise ValueError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    job = result.stdout.strip().split(";")[0]
    (submission.folder / JOB).write_text(json.dumps({"job": job, "script": str(submission.script)}) + "\n")
    return job


def announce(submission: Submission, job: str) -> None:
    """Say how to watch, cancel and resume the job."""
    slurm = submission.slurm
    size = f"{slurm.nodes} nodes x {tasks_per_node(slurm)} processes, {slurm.time}"
    runs = f"{len(submission.runs)} runs of " if submission.is_array else ""
    where = os.path.relpath(submission.log_dir.parent, submission.working_dir)
    log = submission.log_dir / (f"job-{job}_0.log" if submission.is_array else f"job-{job}.log")
    print(f"job {job}: {runs}{size}; folder {where}")
    print(f"  watch   python -m slurm.status {where} --follow")
    print(f"  log     tail -F {os.path.relpath(log, submission.working_dir)}")
    print(f"  cancel  scancel {job}")
    print("  resume  it comes back by itself; after a cancel, the same command goes on from the newest checkpoint")


if __name__ == "__main__":
    main()
