"""What `slurm.status` says of a run, from the files that it left and a queue that is made up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba_train.monitor.heartbeat import FOLDER as HEARTBEATS
from mamba_train.monitor.heartbeat import Heartbeat
from slurm import status
from slurm.status import find_runs, show
from tests.helpers import REPOSITORY

NOW = 1_800_000_000.0


def entry(event: str, job: str = "7", step: int = 0, start: int = 0, reason: str = "", **more: object) -> dict:
    log = more.pop("log", "")
    return {
        "event": event, "job": job, "step": step, "start": start, "time": NOW - 60, "nodes": "node[1-2]",
        "log": str(log), "reason": reason, **more,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(time, "time", lambda: NOW)
    folder = tmp_path / "runs" / "a"
    (folder / "slurm").mkdir(parents=True)
    log = folder / "slurm" / "job-7.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    events = [
        entry("start", log=log),
        entry("requeue", step=40, log=log, reason="stopped after step 40, which is saved (SIGUSR1)"),
        entry("start", step=40, start=1, log=log, reason="stopped after step 40, which is saved (SIGUSR1)"),
    ]
    (folder / "slurm" / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    record = {
        "step": 57, "tokens": 1000, "loss": 2.5, "bits_per_byte": 1.25, "lr": 3e-4, "tokens_per_second": 123456.0,
        "mfu": 0.42, "eta_seconds": 7260.0,
    }  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n" + '{"step": 58, "lo')
    (folder / "config.yaml").write_text("training: {total_steps: 200}\n")
    for step in (9, 40, 50):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    os.utime(folder / "checkpoints" / "step_00000050", (NOW - 130, NOW - 130))
    os.utime(folder / "metrics.jsonl", (NOW - 3, NOW - 3))
    return folder


def queue(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    result = subprocess.CompletedProcess([], 0, stdout=text, stderr="")
    monkeypatch.setattr(status.subprocess, "run", lambda *args, **kwargs: result)


def test_a_run_in_full(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "RUNNING|1:00|23:59:00|node[1-2]|None\n")
    text = show([run_dir], n_lines=3)
    for expected in (
        "job     7: RUNNING on node[1-2] for 1:00, 23:59:00 left",
        "starts  2\n",
        "after step 40 on node[1-2]: stopped after step 40, which is saved (SIGUSR1)",
        "step    57 of 200 (28.5%), 0:03 ago",
        "loss    2.500, 1.250 bits per byte, lr 3.0e-04",
        "speed   123,456 tokens/s, MFU 42.0%, 2:01:00 to go",
        "saved   step 50, 2:10 ago",
        "job-7.log\n  | line 97\n  | line 98\n  | line 99",
    ):
        assert expected in text, text
    assert "line 96" not in text


def test_a_run_is_found_from_inside_its_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "PENDING|0:00|1:00:00||Priority\n")
    submission = run_dir.parent / "slurm" / "submission-001"
    submission.mkdir(parents=True)
    (submission / status.JOB).write_text(json.dumps({"job": "8", "runs": ["b", "a"]}))
    os.utime(submission / status.JOB, (NOW - 1, NOW - 1))
    monkeypatch.chdir(run_dir)
    assert "job     8_1: PENDING (Priority)" in show([Path()], 0)


def test_a_job_that_waits_or_has_gone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "PENDING|0:00|1:00:00||Priority\n")
    assert "job     7: PENDING (Priority)" in show([run_dir], 0)
    queue(monkeypatch, "")
    with (run_dir / "slurm" / "history.jsonl").open("a") as file:
        file.write(json.dumps(entry("gave up", step=50, reason="3 starts without a new checkpoint")) + "\n")
    text = show([run_dir], 0)
    assert "job     7: not in the queue" in text
    assert "last    gave up, 1:00 ago: 3 starts without a new checkpoint" in text


def test_a_job_that_was_submitted_and_has_not_started(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "PENDING|0:00|1:00:00||Resources\n")
    waiting = run_dir.with_name("b")
    (waiting / "slurm" / "submission-001").mkdir(parents=True)
    (waiting / "slurm" / "submission-001" / "job.json").write_text('{"job": "8", "runs": ["."]}')
    text = show([waiting], 0)
    assert "job     8: PENDING (Resources)" in text
    assert "starts  0" in text
    (waiting / "slurm" / "submission-002").mkdir()
    (waiting / "slurm" / "submission-002" / "job.json").write_text('{"job": "9", "runs": ["."]}')
    os.utime(waiting / "slurm" / "submission-002" / "job.json", (NOW, NOW))
    assert "job     9: PENDING (Resources)" in show([waiting], 0), "the newest one"


def test_the_runs_of_a_sweep_that_still_wait_are_shown_too(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "PENDING|0:00|1:00:00||Resources\n")
    submission = run_dir.parent / "slurm" / "submission-001"
    submission.mkdir(parents=True)
    (submission / "job.json").write_text('{"job": "7", "runs": ["b", "a"]}')
    os.utime(submission / "job.json", (NOW - 100, NOW - 100))  # before `a` was started
    lines = show([run_dir.parent], 5).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{run_dir}  job 7", f"{run_dir.with_name('b')}  job 7_0"]
    assert "no step yet" in lines[1]


def test_files_that_are_being_written(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n5\n[]\n{}\n{"st')
    with (run_dir / "slurm" / "history.jsonl").open("a") as file:
        file.write('7\n{"event"')
    for config in ("", "training: {total_ste", "{"):
        (run_dir / "config.yaml").write_text(config)
        text = show([run_dir], 0)
        assert "step    57, " in text
        assert "starts  2\n" in text


@pytest.mark.parametrize(("lines", "shown"), [(0, 0), (-3, 0), (2, 2), (1000, 100)])
def test_how_many_lines_of_the_log(run_dir: Path, monkeypatch: pytest.MonkeyPatch, lines: int, shown: int) -> None:
    queue(monkeypatch, "")
    assert show([run_dir], lines).count("  | line") == shown


def test_many_runs_are_a_line_each(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "RUNNING|1:00|23:59:00|node1|None\n")
    other = run_dir.with_name("c")
    (other / "slurm").mkdir(parents=True)
    (other / "slurm" / "history.jsonl").write_text(json.dumps(entry("start", job="9")) + "\n")
    lines = show([run_dir.parent], 5).splitlines()
    assert len(lines) == 2
    assert "57 of 200" in lines[0]
    assert "job 9: RUNNING" in lines[1]
    assert find_runs(run_dir.parent) == [run_dir, other]


def test_a_folder_without_runs_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slurm.status", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no run there that was submitted" in result.stderr


def test_follow_shows_it_again_and_again(run_dir: Path) -> None:
    # A shell that runs the tests in the background has SIGINT ignored.
    sigint = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{sigint}; import slurm.status as status; status.FOLLOW_SECONDS = 0.2; status.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run_dir), "--follow", "--lines", "1"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        seen = ""
        while "line 99" not in seen:
            seen += process.stdout.readline()
        assert "step    57 of 200" in seen
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"step": 60, "loss": 2.4}) + "\n")
        while "step    60 of 200" not in seen:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert (process.returncode, stderr) == (0, ""), "Ctrl-C is how one leaves"
    finally:
        process.kill()
        process.wait()


def test_it_needs_no_torch(repository: Path) -> None:
    script = "import sys, slurm.status, slurm.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=repository).returncode == 0


def test_ranks_of_a_run_that_is_over_or_a_step_apart_are_not_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(monkeypatch, "")
    for rank, step in enumerate((57, 58)):
        heartbeat = {"rank": rank, "host": "node", "pid": 1, "activity": "step", "step": step}
        Heartbeat(run_dir, rank).write(heartbeat)
        os.utime(run_dir / HEARTBEATS / f"rank_{rank:05d}.json", (NOW - 3600, NOW - 3600))
    line = next(line for line in show([run_dir], 0).splitlines() if line.startswith("ranks"))
    assert line == "ranks   2, step 58, last sign of life 1:00:00 ago"


def test_only_starts_of_the_last_job_and_complete_checkpoints_count(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(monkeypatch, "RUNNING|1:00|23:59:00|node1|None\n")
    (run_dir / "checkpoints" / "step_00000060.tmp").mkdir()
    with (run_dir / "slurm" / "history.jsonl").open("a") as file:
        file.write(json.dumps(entry("start", job="8", step=50)) + "\n")
        file.write(json.dumps(entry("requeue", job="8", step=50, reason="exit code 1")) + "\n")
    text = show([run_dir], 0)
    assert "starts  1\n" in text
    assert "saved   step 50, " in text
    assert "\nlast " not in text, "the next start will say why"


def test_ranks_that_are_silent_or_behind_are_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch, "RUNNING|1:00|23:59:00|node[1-2]|None\n")
    # Whatever its own clock says: the second is an hour behind. The last one gives a sign of life every five minutes.
    ranks = [(58, 4, 0, 10.0), (58, 5, 3600, 10.0), (58, 300, 0, 10.0), (50, 5, 0, 10.0), (58, 290, 0, 300.0)]
    for rank, (step, ago, clock, every) in enumerate(ranks):
        heartbeat = {"rank": rank, "host": f"node{rank}", "pid": 1, "activity": "step", "step": step}
        Heartbeat(run_dir, rank).write({**heartbeat, "time": NOW - ago - clock, "every_seconds": every})
        os.utime(run_dir / HEARTBEATS / f"rank_{rank:05d}.json", (NOW - ago, NOW - ago))
    line = next(line for line in show([run_dir], 0).splitlines() if line.startswith("ranks"))
    assert line == ("ranks   5, step 58, last sign of life 0:04 ago; silent: rank 2 on node2; behind: rank 3 on node3")
