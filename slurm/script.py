"""The sbatch file of a job: settings from a config, then what `train.sbatch` has below its line."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from mamba_train.config import Config, ContainerKind, SlurmConfig

TEMPLATE = Path(__file__).with_name("train.sbatch")
LINE = "# ---- the same for every job from here on"


@dataclass(frozen=True)
class Run:
    """One training of a submission: its folder (absolute) and the overrides that compose its config."""

    run_dir: Path
    overrides: list[str]
    config: Config


@dataclass(frozen=True)
class Submission:
    """What is submitted together: one run, or the runs of a sweep as a job array.

    folder: of this submission, in which `code` is the copy that the job runs. log_dir: where the logs go.
    working_dir: what relative paths in the config refer to.
    """

    runs: list[Run]
    folder: Path
    log_dir: Path
    working_dir: Path

    @property
    def slurm(self) -> SlurmConfig:
        return self.runs[0].config.slurm

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def name(self) -> str:
        return self.slurm.job_name or self.log_dir.parent.name


def render(submission: Submission) -> str:
    """The text of the sbatch file."""
    template = TEMPLATE.read_text(encoding="utf-8")
    body = template[template.index(LINE) :]
    return "\n".join(["#!/bin/bash", *_directives(submission), *_settings(submission), body])


def tasks_per_node(slurm: SlurmConfig) -> int:
    """One process per GPU, or one per node where there is none."""
    return max(1, slurm.gpus_per_node)


def _directives(submission: Submission) -> list[str]:
    slurm, pattern = submission.slurm, "job-%A_%a.log" if submission.is_array else "job-%j.log"
    options: dict[str, object] = {
        "job-name": submission.name,
        "nodes": slurm.nodes,
        "ntasks-per-node": tasks_per_node(slurm),
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "array": f"0-{len(submission.runs) - 1}" if submission.is_array else None,
        "signal": f"USR1@{slurm.signal_seconds}" if slurm.signal_seconds else None,
        "chdir": submission.working_dir,
        "output": submission.log_dir / pattern,
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue", "#SBATCH --open-mode=append", *(f"#SBATCH {line}" for line in slurm.sbatch)]


def _settings(submission: Submission) -> list[str]:
    slurm = submission.slurm
    log_id = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if submission.is_array else "$SLURM_JOB_ID"
    inside = slurm.container is not ContainerKind.none
    return [
        f"LOG={shlex.quote(str(submission.log_dir))}/job-{log_id}.log",
        *_runs(submission),
        f"CODE={shlex.quote(str(submission.code))}",
        f"PYTHON={shlex.quote(slurm.python or ('python' if inside else sys.executable))}",
        f"CONTAINER=({shlex.join(_apptainer(submission))})",
        f"SRUN=({shlex.join(_enroot(submission))})",
        f"GPUS_PER_NODE={slurm.gpus_per_node}",
        f"HEALTH_CHECK={str(slurm.health_check).lower()}",
        f"EXCLUDE_BAD_NODES={str(slurm.exclude_bad_nodes).lower()}",
        f"MAX_STALLED_STARTS={slurm.max_stalled_starts}",
        *(f"export {name}={shlex.quote(value)}" for name, value in (e.split("=", 1) for e in slurm.environment)),
        *slurm.setup,
    ]


def _runs(submission: Submission) -> list[str]:
    def settings(run: Run) -> list[str]:
        return [f"RUN_DIR={shlex.quote(str(run.run_dir))}", f"OVERRIDES=({shlex.join(run.overrides)})"]

    if not submission.is_array:
        return settings(submission.runs[0])
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for index, run in enumerate(submission.runs):
        lines += [f"{index})", *(f"    {line}" for line in settings(run)), "    ;;"]
    return [*lines, "esac"]


def _mounts(submission: Submission) -> list[str]:
    """Folders that the job needs wherever it runs, and those that the site names."""
    own = [submission.working_dir, submission.log_dir, submission.folder, *(run.run_dir for run in submission.runs)]
    return [*dict.fromkeys(str(path) for path in own), *submission.slurm.container_mounts]


def _apptainer(submission: Submission) -> list[str]:
    slurm = submission.slurm
    if slurm.container is not ContainerKind.apptainer:
        return []
    binds = [word for mount in _mounts(submission) for word in ("--bind", mount)]
    gpu = ["--nv"] if slurm.gpus_per_node else []
    return ["apptainer", "exec", *gpu, *binds, "--pwd", str(submission.working_dir), str(slurm.container_image)]


def _enroot(submission: Submission) -> list[str]:
    slurm = submission.slurm
    if slurm.container is not ContainerKind.enroot:
        return []
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(submission))
    return [
        f"--container-image={slurm.container_image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={submission.working_dir}",
    ]
