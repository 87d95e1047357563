"""The batch script itself, run by bash beside a SLURM of small shell scripts; no cluster needed."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.slurm.rendered import script_of

FAKES = {
    # An srun that ends as the file `ends` says, one line for each time, and a SLURM that says the job runs.
    "srun": 'line=$(head -n 1 ends); sed -i 1d ends; eval "$line"',
    "squeue": 'case "$*" in *%x) echo "(null)" ;; *) cat end_time 2>/dev/null || echo 2030-01-01T00:00:00 ;; esac',
    "sinfo": "seq -f node%.0f 4",
    "sleep": "true",
    "scontrol": """
        echo "$@" >>scontrol.log
        case $1 in
            requeue) exit "$(cat requeue 2>/dev/null || echo 0)" ;;
            show) echo "$3" | tr , '\\n' ;;
            *)
                restarts=$(cat restarts 2>/dev/null || echo ${SLURM_RESTART_COUNT:-0})
                echo "JobId=7 JobState=$(cat state) Restarts=$restarts Run"
        esac
    """,
}


@pytest.fixture
def slurm_of_fakes(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "scontrol.log").touch()
    return tmp_path


def start_job(folder: Path, script: str, ends: list[str], number: int = 0, **env: str) -> int:
    """Exit code of a start of the batch script."""
    (folder / "ends").write_text("\n".join(ends) + "\n")
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1,node2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_PARTITION": "main",
        **({"SLURM_RESTART_COUNT": str(number)} if number else {}),
        **env,
    }
    return subprocess.run(
        ["bash"], input=script, cwd=folder, env=environment, capture_output=True, text=True
    ).returncode


def recorded(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "slurm" / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ends", "exit_codes", "events", "requeues"),
    [
        (["exit 0"], [0], ["start", "finished"], 0),
        (["echo 'error: no such file' >>run/slurm/job-7.log; exit 2"], [2], ["start", "refused"], 0),
        # Python and srun say 2 as well, of a file system that is not there.
        (["exit 2", "exit 0"], [2, 0], ["start", "requeue", "start", "finished"], 1),
        (["exit 75"], [75], ["start", "requeue"], 1),
        (["exit 1", "exit 0"], [1, 0], ["start", "requeue", "start", "finished"], 1),
        # No new checkpoint in three starts: given up. With one in between, it goes on.
        (["exit 1"] * 3, [1, 1, 1], ["start", "requeue"] * 3 + ["gave up"], 2),
        (
            ["exit 1", "mkdir -p run/checkpoints/step_00000010; exit 1", "exit 1", "exit 1", "exit 0"],
            [1, 1, 1, 1, 0],
            ["start", "requeue"] * 4 + ["start", "finished"],
            4,
        ),
        (["echo CANCELLED >state; exit 75"], [75], ["start", "left to SLURM"], 0),
        (["echo COMPLETING >state; exit 0"], [1], ["start", "left to SLURM"], 0),  # srun's 0 when a node is lost
        # A node that was cut off: the job has been started anew elsewhere.
        (["echo 1 >restarts; exit 75"], [75], ["start", "left to SLURM"], 0),
        # Queued again by others each time, as by preemption: the starts count as well.
        (
            ["echo REQUEUED >state; exit 75"] * 4,
            [75, 75, 75, 1],
            ["start", "left to SLURM"] * 3 + ["gave up"],
            0,
        ),
    ],
)
def test_when_a_job_comes_back(
    slurm_of_fakes: Path, ends: list[str], exit_codes: list[int], events: list[str], requeues: int
) -> None:
    script = script_of(slurm_of_fakes, "slurm.health_check=false")
    for number, code in enumerate(exit_codes):
        assert start_job(slurm_of_fakes, script, ends[number:], number) == code
    assert [entry["event"] for entry in recorded(slurm_of_fakes)] == events
    assert (slurm_of_fakes / "scontrol.log").read_text().count("requeue 7") == requeues


def test_a_signal_that_comes_before_python_listens_is_a_request_to_stop(slurm_of_fakes: Path) -> None:
    """SLURM may send it half a minute early, in the first instant of a start."""
    assert start_job(slurm_of_fakes, script_of(slurm_of_fakes, "slurm.health_check=false"), ["exit 138"]) == 75
    last = recorded(slurm_of_fakes)[-1]
    assert last["event"] == "requeue"
    assert last["reason"].startswith("SIGUSR1: asked to stop")


def test_a_job_that_slurm_will_not_queue_again_says_so(slurm_of_fakes: Path) -> None:
    (slurm_of_fakes / "requeue").write_text("1")
    assert start_job(slurm_of_fakes, script_of(slurm_of_fakes, "slurm.health_check=false"), ["exit 75"]) == 75
    last = recorded(slurm_of_fakes)[-1]
    assert last["event"] == "gave up"
    assert "SLURM would not queue the job again" in last["reason"]


def test_a_full_disk_under_the_run_ends_the_job(slurm_of_fakes: Path) -> None:
    """Starts that leave no line could not be counted."""
    folder = slurm_of_fakes / "run" / "slurm"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a full disk needs a tmpfs, and only root may mount one")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        script = script_of(slurm_of_fakes, "slurm.health_check=false")
        assert start_job(slurm_of_fakes, script, ["touch trained; exit 1"]) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert not (slurm_of_fakes / "trained").exists()
    assert "requeue" not in (slurm_of_fakes / "scontrol.log").read_text()


@pytest.mark.parametrize(
    ("squeue", "given", "expected"),
    [
        ("2030-01-01T00:00:00", "", "1893456000"),
        ("", "", ""),  # no answer: not midnight of today, which is past
        ("", "1893456000", "1893456000"),  # newer SLURMs say it themselves
        ("N/A", "", ""),
    ],
)
def test_when_a_start_must_be_over(slurm_of_fakes: Path, squeue: str, given: str, expected: str) -> None:
    (slurm_of_fakes / "end_time").write_text(squeue)
    script = script_of(slurm_of_fakes, "slurm.health_check=false")
    env = {"TZ": "UTC", **({"SLURM_JOB_END_TIME": given} if given else {})}
    assert start_job(slurm_of_fakes, script, ['echo "$SLURM_JOB_END_TIME" >seen'], **env) == 0
    assert (slurm_of_fakes / "seen").read_text().strip() == expected


@pytest.mark.parametrize(
    ("nodes", "ends", "reason", "excluded"),
    [
        (2, ["echo well node1; echo bad node2: broken; exit 1"], "not well: node2 (bad node2: broken)", "node2"),
        # Nobody says anything: perhaps not the nodes' fault, yet there are others to try.
        (2, ["exit 2"], "not well: node1,node2 (the check said nothing, the log may)", "node1,node2"),
        # With both excluded the job would wait for ever.
        (3, ["exit 1"], "not well: node1,node2 (the check said nothing, the log may)", None),
        (2, ["exit 138"], "SIGUSR1: asked to stop during the health check", None),
    ],
)
def test_nodes_that_are_not_well(
    slurm_of_fakes: Path, nodes: int, ends: list[str], reason: str, excluded: str | None
) -> None:
    start_job(slurm_of_fakes, script_of(slurm_of_fakes), ends, SLURM_JOB_NUM_NODES=str(nodes))
    assert [entry["event"] for entry in recorded(slurm_of_fakes)] == ["start", "requeue"]
    assert recorded(slurm_of_fakes)[-1]["reason"] == reason
    log = (slurm_of_fakes / "scontrol.log").read_text()
    assert f"ExcNodeList={excluded}\n" in log if excluded else "ExcNodeList" not in log
