"""`python -m slurm.submit [--dry-run] [OVERRIDE ...]`: check a config, plan it, and queue it as a job that comes back.

The overrides are those of train.py, with slurm.nodes and the other slurm.* keys. A key with several values
(optim.lr=1e-3,2e-3) makes a job array with one run for each combination, each in a folder of its own.
"""

import argparse
import itertools
import json
import os
import re
import shlex
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
from mamba_train.config import Config, EngineKind, SlurmConfig
from mamba_train.monitor.redact import names_credential
from slurm.script import Run, Submission, render, tasks_per_node
from slurm.status import JOB, submitted_jobs

REPOSITORY = CONF_DIR.parent
CODE = ("train.py", "conf", "kernels", "mamba_train", "slurm")


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
    shared, choices = sweep(overrides)
    configs = [compose_config([*shared, *swept]) for swept in choices]
    check_alike([config.slurm for config in configs])
    if len({config.run_dir for config in configs}) < len(configs):  # nothing that is swept is in the name
        for config, swept in zip(configs, choices, strict=True):
            name = re.sub(r"[^\w.+-]", "-", "_".join(swept))  # optim.lr-0.001_seed-0
            config.run_dir = str(Path(config.run_dir) / name)
    runs = [
        Run(working_dir / config.run_dir, _pinned([*shared, *swept], config.run_dir), config)
        for config, swept in zip(configs, choices, strict=True)
    ]
    for run in runs:
        check(run.config)
    log_dir = check_folders([run.run_dir for run in runs], working_dir) / run_folder.SLURM
    number = 1
    while (folder := log_dir / f"submission-{number:03d}").exists():
        number += 1
    return Submission(runs, folder, log_dir, working_dir)


def sweep(overrides: list[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The overrides that all runs share, and those in which they differ: every combination of the swept values.

    Nothing is swept: one empty tuple. Raises ValueError for values that are not a list, and for a key given twice.
    """
    parsed = _parse(overrides)
    shared = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    keys = [override.key_or_group for override in parsed]
    choices = []
    for override in (override for override in parsed if override.is_sweep_override()):
        text, key = str(override.input_line), override.key_or_group
        if keys.count(key) > 1:
            raise ValueError(f"{text}: {key} is given more than once; give all its values in one place")
        try:
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        except HydraException as error:
            problem = f"{text}: expected the values themselves, as {key}=A,B,C or {key}=range(0,3)"
            raise ValueError(problem) from error
        if not values:
            raise ValueError(f"{text}: there is no value in it")
        choices.append(values)
    return shared, list(itertools.product(*choices))


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(explain(error)) from error


def _pinned(overrides: list[str], run_dir: str) -> list[str]:
    """With the run's folder in so many words: `${now:...}` would name another one at each start."""
    if f"run_dir={run_dir}" in overrides:
        return overrides
    # Without a slash it might be read as a number; and Hydra knows no letters but those of ASCII.
    plain = re.fullmatch(r"[\w.-]*/[\w./-]*", run_dir, re.ASCII)
    return [*overrides, "run_dir=" + (run_dir if plain else "'" + run_dir.replace("'", "\\'") + "'")]


def check_alike(settings: list[SlurmConfig]) -> None:
    """Raise ValueError when the runs of a sweep want different jobs."""
    for other in settings[1:]:
        for name, value in vars(settings[0]).items():
            if vars(other)[name] != value:
                raise ValueError(
                    f"slurm.{name}: {value} and {vars(other)[name]} in one sweep, which is one job array with the same "
                    f"slurm.* for all runs; submit them one by one, or quote a list: \"slurm.{name}='A,B'\""
                )


def check_folders(run_dirs: list[Path], working_dir: Path) -> Path:
    """The folder that the runs have in common; raises ValueError when they cannot be where they are."""
    for folder in (working_dir, *run_dirs):
        if found := re.search(r'[%\\"\x00-\x1f]', str(folder)):  # sbatch reads some of them as patterns
            raise ValueError(f"run_dir={str(folder)!r}: expected a path without {found[0]!r}")
    if len(set(run_dirs)) < len(run_dirs):
        [twice, *_] = [folder for folder in run_dirs if run_dirs.count(folder) > 1]
        raise ValueError(f"run_dir={twice}: two runs of the sweep have the same folder; give each value once")
    root = Path(os.path.commonpath(run_dirs))
    if root.resolve() == REPOSITORY.resolve():  # where `slurm` is the package that is to be copied
        raise ValueError(f"run_dir={root}: that is the repository; choose a folder below it, such as runs/NAME")
    return root


def check(config: Config) -> None:
    """What only matters for a job on a cluster."""
    slurm, training = config.slurm, config.training
    for line in (*slurm.environment, *slurm.setup):
        for name in re.findall(r"""(\w+)=["']?[^\s$`"']""", line):
            if names_credential(name):
                raise ValueError(
                    f"{name} in slurm.environment or slurm.setup would be saved with the run; export it in the shell "
                    "that submits (SLURM passes it on), or write setup so that it reads a file"
                )
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
    """Raise ValueError when an earlier job of a run, alone or in another sweep, is still in the queue."""
    queued: dict[str, set[str]] = {}
    for run in submission.runs:
        for _, job in submitted_jobs(run.run_dir):
            number = job.partition("_")[0]
            if number not in queued:
                queued[number] = _in_queue(number)
            if job in queued[number]:
                raise ValueError(
                    f"run_dir={run.run_dir}: job {job} is still in the queue and comes back by itself; "
                    f"wait for it, scancel {job}, or choose another run_dir"
                )


def _in_queue(number: str) -> set[str]:
    """A job, or those tasks of an array that have not ended; nothing where there is no SLURM to ask."""
    command = ["squeue", "--noheader", "--array", "--format=%i", "--job", number]
    try:
        return set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    except FileNotFoundError:
        return set()


def plan(submission: Submission) -> None:
    """Print the plan of each run that needs something else than those before it; what does not fit is not submitted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    planned: list[list[object]] = []
    for run in submission.runs:
        config = run.config
        needs: list[object] = [config.model, config.engine, config.training, config.checkpoint]
        needs += [config.data.sequence_length, config.data.vocab_size, config.data.tokenizer]
        if needs in planned:
            continue
        planned.append(needs)
        if submission.is_array:
            print(f"plan of {run.run_dir}:", flush=True)
        command = [sys.executable, "-m", "mamba_train", "plan", "--device", submission.slurm.gpu, *run.overrides]
        result = subprocess.run(command, cwd=submission.working_dir, env=environment)
        if result.returncode:
            sys.exit(result.returncode)


def write(submission: Submission) -> None:
    """Put code, configs and the script into the folder of the submission: a requeued job runs what is there."""
    copy_code(submission.code)
    for index, run in enumerate(submission.runs):
        name = f"config-{index}.yaml" if submission.is_array else "config.yaml"
        OmegaConf.save(OmegaConf.structured(run.config), submission.folder / name)
        run.run_dir.mkdir(parents=True, exist_ok=True)
    submission.script.write_text(render(submission), encoding="utf-8")


def copy_code(folder: Path) -> None:
    """Make a folder with all that a job runs."""
    folder.mkdir(parents=True)
    for name in CODE:
        source, target = REPOSITORY / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)


def sbatch(submission: Submission) -> str:
    """Queue the script and return the job's id; raises ValueError with what sbatch said if it refused."""
    if shutil.which("sbatch") is None:
        raise ValueError(f"sbatch is not on the path of this machine; the script is ready: sbatch {submission.script}")
    result = subprocess.run(["sbatch", "--parsable", str(submission.script)], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(submission.folder)
        raise ValueError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    job = result.stdout.strip().split(";")[0]
    root = submission.log_dir.parent
    runs = [str(run.run_dir.relative_to(root)) for run in submission.runs]
    run_folder.replace(submission.folder / JOB, json.dumps({"job": job, "runs": runs}) + "\n")
    return job


def announce(submission: Submission, job: str) -> None:
    """Say how to watch, cancel and resume the job."""
    slurm = submission.slurm
    size = f"{slurm.nodes} nodes x {tasks_per_node(slurm)} processes, {slurm.time}"
    runs = f"{len(submission.runs)} runs of " if submission.is_array else ""
    where = shlex.quote(os.path.relpath(submission.log_dir.parent, submission.working_dir))
    log = submission.log_dir / (f"job-{job}_0.log" if submission.is_array else f"job-{job}.log")
    print(f"job {job}: {runs}{size}; folder {where}")
    print(f"  watch   python -m slurm.status {where} --follow")
    print(f"  log     tail -F {shlex.quote(os.path.relpath(log, submission.working_dir))}")
    print(f"  cancel  scancel {job}")
    print("  resume  it comes back by itself; after a cancel, the same command goes on from the newest checkpoint")


if __name__ == "__main__":
    main()
