"""What happens when a rank is wrong, raises, or is killed: one message, no hang, and the last checkpoint counts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_train.checkpoint import complete_steps, newest_complete
from tests.distributed.launch import (
    DRIVER,
    TOPOLOGIES,
    SharedRuns,
    child_environment,
    drive,
    free_port,
    kill,
    losses,
    overrides,
    torchrun,
)
from tests.helpers import REPOSITORY

TRAIN = str(REPOSITORY / "train.py")
UNREADABLE = Path(__file__).with_name("unreadable.py")


def by_srun(arguments_of_ranks: list[list[str]], corpus: Path) -> list[subprocess.CompletedProcess[str]]:
    """Start train.py as srun does: one process per rank, who it is in the environment."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, TRAIN, *arguments],
            cwd=corpus.parent,
            env=child_environment(
                SLURM_STEP_ID="0",
                SLURM_JOB_ID="77",
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_NTASKS=str(len(arguments_of_ranks)),
                MASTER_ADDR="localhost",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(arguments_of_ranks)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def error_lines(done: list[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for rank in done for line in (rank.stdout + rank.stderr).splitlines() if line.startswith("error:")]


def test_srun_starts_a_run_too(runs: SharedRuns, texts: Path, tmp_path: Path) -> None:
    settings = overrides(texts, tmp_path / "run", "engine=ddp", "training.total_steps=10")
    done = by_srun([settings, settings], texts)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr
    assert "step 10/10" in done[0].stdout
    assert done[1].stdout == "", "only rank 0 speaks"
    assert [len(str(loss)) > 0 for loss in losses(tmp_path / "run")] == [True] * 10


@pytest.mark.parametrize(
    ("wrong_on", "override", "said"),
    [
        pytest.param((0, 1), "optim.lr=inf", "optim.lr=inf", marks=pytest.mark.slow),
        ((1,), "optim.lr=inf", "optim.lr=inf"),
        pytest.param((0,), "optim.lr=inf", "optim.lr=inf", marks=pytest.mark.slow),
        pytest.param((0, 1), "engine=single", "engine=ddp", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_said_once_and_all_ranks_exit_with_2(
    texts: Path, tmp_path: Path, wrong_on: tuple[int, ...], override: str, said: str
) -> None:
    right = overrides(texts, tmp_path / "run", "engine=ddp")
    done = by_srun([[*right, override] if rank in wrong_on else right for rank in (0, 1)], texts)
    assert [rank.returncode for rank in done] == [2, 2]
    lines = error_lines(done)
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert not any("Traceback" in rank.stderr for rank in done)


@pytest.mark.slow
def test_an_error_that_only_rank_0_can_see_stops_all(texts: Path, tmp_path: Path) -> None:
    settings = overrides(texts, tmp_path / "run", "engine=ddp", "data.path=/dev/null")
    done = by_srun([settings, settings], texts)
    assert [rank.returncode for rank in done] == [2, 2]
    assert len(error_lines(done)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp x 2", "fsdp x 2"])
def test_an_error_of_one_rank_does_not_hang_the_others(texts: Path, tmp_path: Path, name: str) -> None:
    result = drive(TOPOLOGIES[name], texts, tmp_path / "run", options=["--fail-at", "5"])
    assert result.returncode != 0
    assert "rank 1 fails on purpose" in result.stderr


def test_what_one_rank_cannot_read_is_said_at_once(texts: Path, tmp_path: Path) -> None:
    """The others wait in the sum of the step, and would until the watchdog takes it for a hang."""
    command = torchrun(2, str(UNREADABLE), *overrides(texts, tmp_path / "run", "engine=ddp"))
    result = subprocess.run(
        command, cwd=texts.parent, env=child_environment(), capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    assert "error: shard-7.bin: token 5 of 10 is not there\n" in result.stderr
    assert "ReadError" not in result.stderr
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text()
    assert "hang" not in ledger


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("name", ["fsdp x 2", "zero-3 x 2"])
def test_killed_in_the_middle_of_an_asynchronous_save(
    runs: SharedRuns, texts: Path, tmp_path: Path, name: str, victims: tuple[int, ...]
) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    topology, run_dir = TOPOLOGIES[name], tmp_path / "run"
    often = ("checkpoint.interval_steps=5",)
    command = torchrun(topology.processes, str(DRIVER), "--stall-save-of", "10")
    command += overrides(texts, run_dir, *topology.overrides, *often)
    process = subprocess.Popen(
        command,
        cwd=texts.parent,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # The save of step 10 hangs in a thread of rank 1, and the training goes on meanwhile.
    stalled = run_dir / "stalled"
    wait_until(lambda: stalled.exists() and len(losses_so_far(run_dir)) >= 12, process)
    kill([int((run_dir / f"pid_{rank}").read_text()) for rank in victims])
    try:
        process.wait(timeout=90)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.returncode != 0
    folder = run_dir / "checkpoints"
    assert (folder / stalled.read_text()).exists(), "the unfinished save lies beside the checkpoints"
    assert complete_steps(folder) == [5]
    assert newest_complete(folder, pytest.fail) == folder / "step_00000005"
    result = drive(topology, texts, run_dir, *often)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "resuming after step 5" in result.stdout
    assert losses(run_dir) == losses(runs.get(name))
    assert not list(folder.glob("writing.*"))


def losses_so_far(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_weights_that_are_not_the_saved_ones_are_noticed(runs: SharedRuns, texts: Path, tmp_path: Path) -> None:
    """`checkpoint.verify_forward`: all hashes are right, but the loss that was noted is that of other weights."""
    from mamba_train.checkpoint import load, save

    checkpoint = load(runs.get("one") / "checkpoints" / "step_00000015")
    checkpoint.model["norm.weight"] *= 1.5
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    save(tmp_path / "run" / "checkpoints", checkpoint, reserve_gib=0)
    result = drive(TOPOLOGIES["one"], texts, tmp_path / "run")
    assert result.returncode != 0
    assert "a forward pass gives a loss of" in result.stderr


def test_ranks_that_cannot_meet_say_so(texts: Path, tmp_path: Path) -> None:
    environment = child_environment(RANK="0", WORLD_SIZE="2")
    command = [sys.executable, TRAIN, *overrides(texts, tmp_path / "run", "engine=ddp")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: MASTER_ADDR is not set")
    assert "Traceback" not in result.stderr


def test_the_first_host_of_a_slurm_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_train.ranks import launch

    for name in [name for name in os.environ if name in ("RANK", "MASTER_ADDR", "MASTER_PORT")]:
        monkeypatch.delenv(name)
    for listed, first in [
        ("gpu[007-012,020],login", "gpu007"),
        ("node4", "node4"),
        ("a[1,3]", "a1"),
        ("rack1-gpu[2-3]-ib", "rack1-gpu2-ib"),
        ("x1,x2", "x1"),
    ]:
        monkeypatch.setenv("SLURM_STEP_ID", "1")
        monkeypatch.setenv("SLURM_PROCID", "3")
        monkeypatch.setenv("SLURM_LOCALID", "1")
        monkeypatch.setenv("SLURM_NTASKS", "4")
        monkeypatch.setenv("SLURM_JOB_ID", "70001")
        monkeypatch.setenv("SLURM_STEP_NODELIST", listed)
        here = launch()
        assert here.address is not None
        assert (here.rank, here.world_size, here.local_rank, here.address[0]) == (3, 4, 1, first)
        assert 1024 < here.address[1] < 65536
    monkeypatch.delenv("SLURM_STEP_ID")
    assert launch().world_size == 1, "a batch script is no step"
