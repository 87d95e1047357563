"""Jobs on a real SLURM: whatever happens to them, they come back and end as if nothing had happened."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba_train.monitor.event_log import read_events
from slurm.script import LINE, TEMPLATE
from slurm.submit import copy_code
from tests.helpers import REPOSITORY, curve, metrics, train_command
from tests.slurm.cluster import N_NODES, Cluster, wait_for
from tests.slurm.conftest import Job, Undisturbed, slow_down, submit, submit_job

pytestmark = pytest.mark.slow


def history(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.run_dir / "slurm" / "history.jsonl").read_text().splitlines()]


def events(job: Job) -> list[str]:
    return [entry["event"] for entry in history(job)]


def status(job: Job) -> str:
    """What `python -m slurm.status` prints."""
    command = [sys.executable, "-m", "slurm.status", str(job.run_dir)]
    result = subprocess.run(command, cwd=REPOSITORY, env=job.cluster.env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_is_a_real_slurm(cluster: Cluster) -> None:
    assert cluster.n_running("munged") == 1
    assert len(cluster.node_states()) == N_NODES == 4
    hosts = cluster.run("srun", "--nodes=4", "--ntasks=4", "printenv", "SLURMD_NODENAME").split()
    assert sorted(hosts) == ["node1", "node2", "node3", "node4"]


def test_a_job_on_two_nodes(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """Completes; comes back when one of its ranks is killed; and all ranks stop when one of them is asked to."""
    overrides = ("training.total_steps=40", "checkpoint.interval_steps=8", "checkpoint.keep_best=false", "engine=ddp")
    two = ("slurm.nodes=2", "slurm.health_check=true")
    for name in ("plain", "killed", "asked"):
        (tmp_path / name).mkdir()
    plain = submit_job(cluster, tmp_path / "plain", corpus, *overrides, *two)
    asked = submit_job(cluster, tmp_path / "asked", corpus, *overrides, *two, hold_after=12)
    asked.wait_for_steps(12)
    os.kill(cluster.task_pids(asked.id, rank=1)[0], signal.SIGUSR1)
    asked.go()
    killed = submit_job(cluster, tmp_path / "killed", corpus, *overrides, *two, hold_after=12)
    killed.wait_for_steps(12, saved=8)
    assert "ranks   2, " in status(killed)
    os.kill(cluster.task_pids(killed.id, rank=1)[0], signal.SIGKILL)
    killed.go()
    killed_at = time.monotonic()
    wait_for(lambda: len(events(killed)) > 1, "the batch script to notice", 60)
    assert time.monotonic() - killed_at < 30, "seconds, not the time-out of a collective"
    for job in (plain, asked, killed):
        job.wait_for_end()
    assert (plain.restarts, asked.restarts, killed.restarts) == (0, 1, 1)
    assert len(set(history(plain)[0]["nodes"].strip("node[]"))) > 1, "two nodes"
    assert killed.repeated_steps() == [9, 10, 11, 12]
    assert not asked.repeated_steps()
    assert "SIGUSR1" in history(asked)[1]["reason"]
    assert curve(killed.run_dir) == curve(plain.run_dir) == curve(asked.run_dir)
    assert len(curve(plain.run_dir)) == 40


def test_scontrol_requeue(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    # SLURM's signals reach the processes that read ahead, too.
    overrides = ("training.total_steps=60", "checkpoint.interval_steps=50", "data.workers=1")
    job = submit_job(cluster, tmp_path, corpus, *overrides, "logging.wandb=offline", hold_after=10)
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_steps(10)
    page = status(job)
    assert f"job     {job.id}: RUNNING on node" in page
    assert " of 60 (" in page
    assert "step 10/60" in page, "the tail of the log"
    cluster.run("scontrol", "requeue", job.id)
    job.go()
    job.wait_for_end()
    assert job.restarts == 1
    assert job.log.count("the copy runs") == 2, "a requeued job runs the code that was submitted"
    assert not job.repeated_steps(), "the stop was saved"
    undisturbed.check_equal(job)
    assert events(job) == ["start", "left to SLURM", "start", "finished"]
    assert "SIGTERM" in history(job)[1]["reason"]
    starts = [folder.name for folder in (job.run_dir / "wandb").glob("offline-run-*")]
    assert len(starts) == 2
    assert len({name.rpartition("-")[2] for name in starts}) == 1, "the same wandb run"
    page = status(job)
    assert "last    finished" in page
    assert "step    60 of 60 (100.0%)" in page
    assert "(SIGTERM)" in page, "why it was started again"


def test_the_signal_of_slurm(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """--signal=USR1@SECONDS reaches Python, which saves; the batch script requeues."""
    overrides = ("training.total_steps=200", "checkpoint.interval_steps=1000", "checkpoint.keep_best=false")
    # SLURM sends it up to half a minute early, so 60 to 90 seconds after the start: the run is in its steps, which take
    # longer than that in the first one.
    job = submit_job(cluster, tmp_path, corpus, *overrides, "slurm.time=3", "slurm.signal_seconds=90", step_seconds=0.5)
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_end()
    assert job.restarts >= 1
    assert not job.repeated_steps()
    undisturbed.check_equal(job)
    reasons = [entry["reason"] for entry in history(job) if entry["event"] == "requeue"]
    assert len(reasons) == job.restarts
    assert all("SIGUSR1" in reason for reason in reasons), reasons
    assert "which is saved" in reasons[0]


def test_the_time_limit(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """No signal is asked for: the run knows its end time and how long a save takes."""
    overrides = ("training.total_steps=110", "checkpoint.interval_steps=1000", "checkpoint.keep_best=false")
    # The steps of the first start alone take 55 of the 60 seconds, of which the run leaves the last ten alone.
    job = submit_job(cluster, tmp_path, corpus, *overrides, "slurm.time=1", "slurm.signal_seconds=0", step_seconds=0.5)
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_end()
    assert job.restarts >= 1
    assert not job.repeated_steps()
    undisturbed.check_equal(job)
    assert all("time limit" in entry["reason"] for entry in history(job) if entry["event"] == "requeue")
    assert "TIMEOUT" not in job.log


def test_a_killed_rank(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    overrides = ("training.total_steps=60", "checkpoint.interval_steps=8", "checkpoint.keep_best=false")
    job = submit_job(cluster, tmp_path, corpus, *overrides, hold_after=20)
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_steps(20, saved=16)
    os.kill(cluster.task_pids(job.id)[0], signal.SIGKILL)
    job.wait_for_end()
    assert job.restarts == 1
    assert job.repeated_steps() == [17, 18, 19, 20], "from the last checkpoint, not from the beginning"
    undisturbed.check_equal(job)
    assert "exit code 137" in history(job)[1]["reason"]


def test_a_stopped_rank(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """It gives no sign of life, so the other one names it and leaves; SLURM kills it, and the job comes back."""
    overrides = ("training.total_steps=40", "checkpoint.interval_steps=8", "checkpoint.keep_best=false", "engine=ddp")
    quick = ("watchdog.step_seconds=20", "watchdog.heartbeat_seconds=0.5")
    for name in ("plain", "stopped"):
        (tmp_path / name).mkdir()
    plain = submit_job(cluster, tmp_path / "plain", corpus, *overrides, "slurm.nodes=2")
    job = submit_job(cluster, tmp_path / "stopped", corpus, *overrides, *quick, "slurm.nodes=2", hold_after=12)
    # Not in a save or a validation, which may take far longer than a step before it is a hang.
    job.wait_for_steps(12, saved=8)
    pid = cluster.task_pids(job.id, rank=1)[0]
    os.kill(pid, signal.SIGSTOP)
    job.go()
    for one in (job, plain):
        one.wait_for_end()
    assert (plain.restarts, job.restarts) == (0, 1)
    assert f"no sign of life of rank 1 (process {pid} on" in history(job)[1]["reason"]
    (hang,) = [event for event in read_events(job.run_dir) if event["kind"] == "hang"]
    assert hang["silent"] == [1]
    assert list((job.run_dir / "hangs").glob("step_*_rank_00000.txt"))
    assert job.repeated_steps() == [9, 10, 11, 12]
    assert curve(job.run_dir) == curve(plain.run_dir)


def test_a_lost_node(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """The daemon and everything else on one of two nodes dies at once; SLURM starts the job on others."""
    overrides = ("training.total_steps=60", "checkpoint.interval_steps=8", "checkpoint.keep_best=false", "engine=fsdp")
    for name in ("plain", "lost"):
        (tmp_path / name).mkdir()
    plain = submit_job(cluster, tmp_path / "plain", corpus, *overrides, "slurm.nodes=2", "slurm.exclude='node[1-2]'")
    first = ("slurm.nodes=2", "slurm.exclude='node[3-4]'")
    job = submit_job(cluster, tmp_path / "lost", corpus, *overrides, *first, hold_after=20)
    job.wait_for_steps(20, saved=16)
    before = cluster.run("scontrol", "show", "hostnames", cluster.job(job.id)["NodeList"]).split()
    cluster.kill_node(before[1])
    job.go()
    try:
        wait_for(lambda: cluster.job(job.id)["JobState"] == "PENDING", "the job to wait for nodes", 60)
        cluster.run("scontrol", "update", f"JobId={job.id}", f"ExcNodeList={before[1]}")
        job.wait_for_end()
        plain.wait_for_end()
        assert (plain.restarts, job.restarts) == (0, 1)
        after = cluster.run("scontrol", "show", "hostnames", cluster.job(job.id)["NodeList"]).split()
        assert before[1] not in after
        assert job.repeated_steps() == [17, 18, 19, 20]
        assert curve(job.run_dir) == curve(plain.run_dir)
        assert len(curve(plain.run_dir)) == 60
    finally:
        cluster.start_node(before[1])
        wait_for(lambda: cluster.node_states()[before[1]] == "idle", f"{before[1]} to come back", 60)


def test_a_lost_daemon_whose_processes_live_on(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """Two starts must not train in one folder: the second waits for the run's lock."""
    overrides = ("training.total_steps=60", "checkpoint.interval_steps=8", "checkpoint.keep_best=false")
    job = submit_job(cluster, tmp_path, corpus, *overrides, hold_after=10)
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_steps(10)
    [pid] = cluster.task_pids(job.id)[:1]
    node = cluster.job(job.id)["NodeList"]
    os.kill(pid, signal.SIGSTOP)  # cut off from everything, and still holding the lock
    cluster.kill_daemon(node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        wait_for(lambda: job.restarts == 1 and events(job).count("start") == 2, "the second start", 90)
        time.sleep(10)
        assert job.n_steps <= 60
        os.kill(pid, signal.SIGKILL)
        job.wait_for_end()
        undisturbed.check_equal(job)
        assert events(job)[0] == "start"
        assert events(job)[-1] == "finished"
        assert "finished" not in events(job)[:-1], "the start that was lost must not look like a success"
    finally:
        cluster.start_node(node)
        wait_for(lambda: cluster.node_states()[node] == "idle", f"{node} to come back", 60)


def test_a_job_that_cannot_progress_is_given_up(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    overrides = ("training.total_steps=20", "checkpoint.reserve_gib=1e9", "slurm.max_stalled_starts=2")
    job = submit_job(cluster, tmp_path, corpus, *overrides)
    job.wait_for_end("FAILED")
    assert job.restarts == 1
    last = history(job)[-1]
    assert last["event"] == "gave up"
    assert "2 starts without a new checkpoint after step 0" in last["reason"]
    assert "no space for a checkpoint" in last["reason"]


def test_a_mistake_is_not_repeated(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty").mkdir()
    job = submit_job(cluster, tmp_path, corpus, f"data.path={tmp_path / 'empty'}")
    job.wait_for_end("FAILED")
    assert job.restarts == 0
    assert events(job) == ["start", "refused"]


def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    job = submit_job(cluster, tmp_path, corpus, "training.total_steps=2000", "checkpoint.interval_steps=100000")
    job.wait_for_steps(10)
    refused = submit(cluster, tmp_path, corpus, "training.total_steps=2000")
    assert refused.returncode == 2
    assert f"job {job.id} is still in the queue" in refused.stderr
    cluster.run("scancel", job.id)
    wait_for(lambda: cluster.job(job.id)["JobState"] == "CANCELLED" and "left to SLURM" in events(job), "the end", 30)
    # One more than recorded when the signal came during a validation.
    assert job.saved[0] - job.n_steps in (0, 1)
    time.sleep(8)
    assert cluster.job(job.id)["JobState"] == "CANCELLED"
    assert job.restarts == 0


def test_a_sweep_is_a_job_array(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """Each run comes back for itself; the last one has the number of the array itself."""
    lrs = ("0.001", "0.002", "0.004")
    result = submit(
        cluster, tmp_path, corpus, "training.total_steps=300", "schedule=constant", f"optim.lr={','.join(lrs)}"
    )
    assert result.returncode == 0, result.stderr
    array = result.stdout.split("job ")[1].split(":")[0]
    jobs = [Job(cluster, f"{array}_{n}", tmp_path / "run" / f"optim.lr-{lr}") for n, lr in enumerate(lrs)]
    jobs[2].wait_for_steps(5)
    os.kill(cluster.task_pids(jobs[2].id)[0], signal.SIGKILL)
    for job, lr in zip(jobs, lrs, strict=True):
        job.wait_for_end()
        records = metrics(job.run_dir)
        assert len(records) == 300
        assert records[-1]["lr"] == float(lr)
    assert [job.restarts for job in jobs] == [0, 0, 1]


def test_a_bad_node_is_named_and_excluded(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    # The first node that is asked is the bad one.
    command = f"! mkdir {tmp_path / 'asked'} || {{ echo GPU 3 fell off the bus; exit 1; }}"
    job = submit_job(
        cluster,
        tmp_path,
        corpus,
        "training.total_steps=20",
        "slurm.exclude='node[3-4]'",
        "slurm.health_check=true",
        env={"MAMBA_TRAIN_HEALTH_COMMAND": command},
    )
    job.wait_for_end()
    assert job.restarts == 1
    bad, good = history(job)[0]["nodes"], cluster.job(job.id)["NodeList"]
    assert {bad, good} == {"node1", "node2"}
    entry = history(job)[1]
    assert entry["event"] == "requeue"
    assert entry["reason"] == f"not well: {bad} (bad {bad}: GPU 3 fell off the bus)"
    # In addition to those that the config excludes.
    assert cluster.job(job.id)["ExcNodeList"] == f"node[3-4],{bad}"


def test_a_check_that_fails_on_all_nodes_does_not_leave_the_job_waiting(
    cluster: Cluster, tmp_path: Path, corpus: Path
) -> None:
    env = {"MAMBA_TRAIN_HEALTH_COMMAND": "no-such-command"}
    job = submit_job(cluster, tmp_path, corpus, "slurm.nodes=2", "engine=ddp", "slurm.health_check=true", env=env)
    job.wait_for_end("FAILED")
    assert events(job) == ["start", "requeue"] * 3 + ["gave up"]
    assert "no-such-command: command not found" in history(job)[-1]["reason"]


def test_a_signal_during_the_health_check_blames_no_node(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    held = tmp_path / "held"
    command = f"! mkdir {held} || sleep 60"
    job = submit_job(
        cluster,
        tmp_path,
        corpus,
        "training.total_steps=20",
        "slurm.health_check=true",
        env={"MAMBA_TRAIN_HEALTH_COMMAND": command},
    )
    wait_for(held.exists, "the health check", 60)
    cluster.run("scancel", "--signal=USR1", job.id)
    job.wait_for_end()
    assert events(job) == ["start", "requeue", "start", "finished"]
    assert history(job)[1]["reason"] == "SIGUSR1: asked to stop during the health check"
    assert cluster.job(job.id)["ExcNodeList"] == "(null)"


def test_the_plain_script_filled_in_by_a_person(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    overrides = ("training.total_steps=200", "checkpoint.interval_steps=1000", "checkpoint.keep_best=false")
    command = train_command(tmp_path / "run", corpus, *overrides)
    copy_code(code := tmp_path / "code")
    slow_down(code, tmp_path / "run", 0, hold_after=20)
    filled_in = {
        "#SBATCH --nodes": "1",
        "#SBATCH --ntasks-per-node": "1",
        "#SBATCH --gpus-per-node": None,
        "#SBATCH --cpus-per-task": "1",
        "#SBATCH --time": "0:05:00",
        "RUN_DIR": str(tmp_path / "run"),
        "CODE": str(code),
        "PYTHON": sys.executable,
        "OVERRIDES": f"({shlex.join(command[2:])})",
        "GPUS_PER_NODE": "0",
    }
    head, line, body = TEMPLATE.read_text().partition(LINE)
    lines = []
    for text in head.splitlines():
        key, _, value = text.rpartition("=") if text.startswith("#") else text.partition("=")
        value = filled_in.pop(key, value)
        lines += [] if value is None else [f"{key}={value}" if key else text]
    assert not filled_in
    (tmp_path / "mine.sbatch").write_text("\n".join([*lines, line + body]))
    options = ["--parsable", f"--chdir={tmp_path}", "--export=ALL,OMP_NUM_THREADS=1"]
    job = Job(cluster, cluster.run("sbatch", *options, str(tmp_path / "mine.sbatch")).strip(), tmp_path / "run")
    job.wait_for_steps(20)
    cluster.run("scontrol", "requeue", job.id)
    job.go()
    undisturbed = Undisturbed(tmp_path, corpus, *overrides)
    job.wait_for_end()
    assert job.restarts == 1
    assert not job.repeated_steps()
    undisturbed.check_equal(job)
    assert events(job) == ["start", "left to SLURM", "start", "finished"]
    assert "saved (SIGTERM)" in history(job)[1]["reason"], "found in the log that the head of the script names"
    assert (tmp_path / f"mamba-{job.id}.log").is_file()
