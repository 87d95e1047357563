"""A real SLURM for the tests of this folder, and jobs on it."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mamba_train.checkpoint.storage import complete_steps
from tests.helpers import REPOSITORY, TINY_RUN, curve, environment, metrics, train_command
from tests.slurm.cluster import N_NODES, Cluster, wait_for, why_not

# Put into a job's copy of the code. The steps of the first start are slow; and before one of them it waits, if the test
# says so, until the test has done to it what it wants and lets it go: however busy the machine is, that happens there.
# Later starts are not disturbed any more, and run as fast as they can.
SLOW_STEPS = """

import os
import time
from pathlib import Path

_step = Trainer._step


def _slow_step(self):
    if "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep({seconds})
        while self.state.step == {hold_after} and not Path({go!r}).exists():
            time.sleep(0.02)
    return _step(self)


Trainer._step = _slow_step
print("the copy runs")
"""


def slow_down(code: Path, run_dir: Path, seconds: float, hold_after: int | None) -> None:
    """Put SLOW_STEPS into a copy of the code."""
    trainer = code / "mamba_train" / "training" / "trainer.py"
    slow = SLOW_STEPS.format(seconds=seconds, hold_after=hold_after, go=str(run_dir / "go"))
    trainer.write_text(trainer.read_text() + slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as running:
        assert running.n_running("slurmctld") == 1
        assert running.n_running("slurmd") == N_NODES
        yield running


@dataclass
class Job:
    """A run that was submitted to the cluster."""

    cluster: Cluster
    id: str
    run_dir: Path

    @property
    def n_steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def saved(self) -> list[int]:
        return complete_steps(self.run_dir / "checkpoints")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("job-*.log")))

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    def wait_for_steps(self, n_steps: int, saved: int | None = None) -> None:
        """Until so many steps are recorded, and a checkpoint is complete."""
        wait_for(lambda: self.n_steps >= n_steps, f"step {n_steps} of job {self.id}", 90)
        wait_for(lambda: saved is None or saved in self.saved, f"checkpoint {saved} of job {self.id}", 90)

    def go(self) -> None:
        """Let a job go on that waits after `hold_after` steps."""
        (self.run_dir / "go").touch()

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        end = self.cluster.wait_for_end(self.id)
        assert end["JobState"] == state, self.log

    def repeated_steps(self) -> list[int]:
        """Steps that were done again after a restart."""
        return [
            int(line.split('"step":')[1].split(",")[0])
            for path in self.run_dir.glob("metrics.cut-*.jsonl")
            for line in path.read_text().splitlines()
        ]


def submit(
    cluster: Cluster, folder: Path, corpus: Path, *overrides: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m slurm.submit` of a tiny run in `folder`, one process per node on its CPU."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "slurm.submit",
            "data=local",
            f"data.path={corpus}",
            f"data.cache_dir={corpus.parent / 'cache'}",
            *TINY_RUN,
            "slurm.nodes=1",
            "slurm.gpus_per_node=0",
            "slurm.time=10",
            "slurm.health_check=false",
            "run_dir=run",
            *overrides,
        ],
        cwd=folder,
        env={**cluster.env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def submit_job(
    cluster: Cluster,
    folder: Path,
    corpus: Path,
    *overrides: str,
    step_seconds: float = 0.1,
    hold_after: int | None = None,
    env: dict[str, str] | None = None,
) -> Job:
    """Submit a run whose first start takes `step_seconds` for a step at least, and waits after so many."""
    # Released when its copy of the code is as it should be: it may be read as soon as it is queued.
    result = submit(cluster, folder, corpus, *overrides, "slurm.sbatch=['--hold']", env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    job = next(line for line in result.stdout.splitlines() if line.startswith("job ")).split()[1].rstrip(":")
    slow_down(folder / "run" / "slurm" / "submission-001" / "code", folder / "run", step_seconds, hold_after)
    cluster.run("scontrol", "release", job)
    return Job(cluster, job, folder / "run")


class Undisturbed:
    """The same run without SLURM, in a process beside the job."""

    def __init__(self, folder: Path, corpus: Path, *overrides: str) -> None:
        self.run_dir = folder / "undisturbed"
        self._process = subprocess.Popen(
            train_command(self.run_dir, corpus, *overrides),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check_equal(self, job: Job) -> None:
        """Steps, tokens, losses, grad norms and learning rates, bit by bit."""
        _, stderr = self._process.communicate(timeout=240)
        assert self._process.returncode == 0, stderr
        assert curve(job.run_dir) == curve(self.run_dir)
        losses = [record["loss"] for record in metrics(job.run_dir)]
        assert losses[-1] < losses[0] - 0.5, "the loss must fall for the comparison to mean something"
