"""Of what is queued already: a run is not submitted twice, and what SLURM refuses leaves nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from slurm import submit
from slurm.status import JOB, submitted_jobs
from slurm.submit import compose_submission, refuse_second_job
from tests.slurm.rendered import BASE


def queued_by(root: Path, job: str, *runs: str) -> None:
    folder = root / "slurm" / "submission-001"
    folder.mkdir(parents=True)
    (folder / JOB).write_text(json.dumps({"job": job, "runs": list(runs)}))


def test_a_run_whose_job_is_queued_is_refused_alone_and_in_any_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def squeue(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "--array" in command, "otherwise the tasks that wait are one line, 7_[1-3]"
        queue = {"7": "7_1\n", "8": "8\n"}[command[-1]]
        return subprocess.CompletedProcess(command, 0, stdout=queue, stderr="")

    monkeypatch.setattr("slurm.submit.subprocess.run", squeue)
    queued_by(tmp_path / "run", "7", "seed-0", "seed-1")
    queued_by(tmp_path / "run" / "seed-2", "8", ".")
    refuse_second_job(compose_submission([*BASE, "run_dir=run/seed-0"], tmp_path))  # this task has ended
    refuse_second_job(compose_submission([*BASE, "run_dir=run/seed-3"], tmp_path))
    for overrides, job in ((["run_dir=run/seed-1"], "7_1"), (["run_dir=run", "seed=2,3"], "8")):
        with pytest.raises(ValueError, match=f"job {job} is still in the queue"):
            refuse_second_job(compose_submission([*BASE, *overrides], tmp_path))


def test_what_earlier_submissions_left_is_read_as_far_as_it_says_something(tmp_path: Path) -> None:
    queued_by(tmp_path / "sweep", "7", "seed-0", "seed-1")
    run_dir = tmp_path / "sweep" / "seed-1"
    (run_dir / "slurm" / "submission-001").mkdir(parents=True)
    own = run_dir / "slurm" / "submission-001" / JOB
    own.write_text('{"job": "5", "script": "job.sbatch"}')  # as the first version wrote it
    above = tmp_path / "slurm" / "submission-001"  # somebody else's, perhaps
    above.mkdir(parents=True)
    (above / JOB).touch()
    assert sorted(job for _, job in submitted_jobs(run_dir)) == ["5", "7_1"]
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    assert sorted({job for _, job in submitted_jobs(link)}) == ["5", "7_1"]
    for content in ("", "{}"):
        own.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(own))):
            list(submitted_jobs(run_dir))


class Queue:
    """sbatch and squeue of a cluster of which only the queue is looked at."""

    def __init__(self) -> None:
        self.queued: list[str] = []
        self.refusal = ""

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "squeue":
            job = command[command.index("--job") + 1]
            tasks = f"{job}\n{job}_0\n{job}_1\n" if job in self.queued else ""  # whether it is an array or not
            return subprocess.CompletedProcess(command, 0, stdout=tasks, stderr="")
        assert command[0] == "sbatch"
        if self.refusal:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=self.refusal)
        self.queued.append(str(7 + len(self.queued)))
        return subprocess.CompletedProcess(command, 0, stdout=f"{self.queued[-1]};cluster\n", stderr="")


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Queue:
    found = Queue()
    monkeypatch.setattr(submit.subprocess, "run", found.run)
    monkeypatch.setattr(submit.shutil, "which", lambda name: name)
    monkeypatch.setattr(submit, "plan", lambda submission: None)
    monkeypatch.setattr(submit, "CODE", ("train.py", "slurm"))
    monkeypatch.chdir(tmp_path)
    return found


def submits(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", *BASE, *overrides])
    submit.main()


def test_a_run_whose_job_is_queued_is_not_submitted_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submits(monkeypatch, "run_dir=run")
    folder = Path("run/slurm/submission-001")
    assert capsys.readouterr().out.startswith("job 7: 2 nodes x 2 processes")
    assert json.loads((folder / "job.json").read_text()) == {"job": "7", "runs": ["."]}
    assert (folder / "job.sbatch").read_text().startswith("#!/bin/bash")
    assert OmegaConf.load(folder / "config.yaml").run_dir == "run"
    assert sorted(path.name for path in (folder / "code").iterdir()) == ["slurm", "train.py"]
    with pytest.raises(SystemExit):
        submits(monkeypatch, "run_dir=run")
    assert "run: job 7 is still in the queue and comes back by itself" in capsys.readouterr().err
    queue.queued[:] = ["8"]
    submits(monkeypatch, "run_dir=run")
    assert Path("run/slurm/submission-002/job.json").is_file()


@pytest.mark.parametrize("first", ["sweep", "alone"])
def test_a_run_that_is_queued_in_a_sweep_is_not_submitted_alone(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    sweep, alone = ("run_dir=run", "seed=0,1"), ("run_dir=run/seed-1", "seed=1")
    one, other = (sweep, alone) if first == "sweep" else (alone, sweep)
    submits(monkeypatch, *one)
    with pytest.raises(SystemExit):
        submits(monkeypatch, *other)
    assert "run/seed-1: job 7" in capsys.readouterr().err
    submits(monkeypatch, "run_dir=run", "seed=2,3")  # others in the same folder
    assert queue.queued == ["7", "8"]


def test_what_sbatch_refuses_leaves_no_submission(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.refusal = "sbatch: error: invalid\npartition"
    with pytest.raises(SystemExit):
        submits(monkeypatch, "run_dir=run")
    assert "error: sbatch refused the job: sbatch: error: invalid partition\n" in capsys.readouterr().err
    assert list(Path("run/slurm").iterdir()) == []
