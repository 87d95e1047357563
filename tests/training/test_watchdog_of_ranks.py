"""A hang of one rank of several: who says it, who waits, and what comes after."""

import itertools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mamba_train.config import Config, WatchdogConfig, data_limit_seconds
from mamba_train.config_data import DataConfig
from mamba_train.monitor.event_log import read_events
from mamba_train.monitor.heartbeat import FOLDER, Heartbeat, read_heartbeats
from mamba_train.training.hooks.watchdog import SILENT_INTERVALS, SPEAKER_INTERVALS
from mamba_train.training.preemption import EXIT_RESTART
from tests.distributed.launch import child_environment, overrides, torchrun
from tests.helpers import REPOSITORY, metrics
from tests.training.watching import QUICK, make_hook, wait_for


class Left(BaseException):
    """In the place of os._exit, which would end the tests."""


class OtherRank(Heartbeat):
    """Gives a sign of life, which says where it is, whenever this rank looks."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, activity: str, step: int) -> None:
        super().__init__(run_dir, 0)
        count = itertools.count()

        def live(folder: Path) -> dict[int, dict[str, Any]]:
            self.write({"rank": 0, "host": "node", "pid": 1, "activity": activity, "step": step, "time": next(count)})
            return read_heartbeats(folder)

        monkeypatch.setattr("mamba_train.training.hooks.watchdog.read_heartbeats", live)


HANGS = WatchdogConfig(heartbeat_seconds=0.3, step_seconds=2.0)


def forbid_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr("mamba_train.training.hooks.watchdog.os._exit", left)


def leave(run_dir: Path, monkeypatch: pytest.MonkeyPatch, **alerts: Any) -> float:
    """What rank 1 of 2 does whose step 7 hangs; returns the seconds that it took until it left."""
    forbid_to_leave(monkeypatch)
    hook = make_hook(run_dir, HANGS, 1, **alerts)
    hook.begin("step", 7)
    began = time.monotonic()
    try:
        with pytest.raises(Left, match=str(EXIT_RESTART)):
            hook._end(hook._activity)
        return time.monotonic() - began
    finally:
        hook.close(failed=True)


def test_a_hang_is_said_by_a_rank_that_has_found_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is still in a hook, which may take far longer than a step: it will not say anything."""
    OtherRank(tmp_path, monkeypatch, "after the step", 6)
    leave(tmp_path, monkeypatch)
    (hang,) = read_events(tmp_path)
    assert hang["kind"] == "hang"
    assert "elsewhere: rank 0 on node (after the step 6)" in hang["text"]


def test_the_rank_that_speaks_leaves_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun kills the whole step when one task has left: rank 0 may be behind by its interval, and its alert takes."""
    OtherRank(tmp_path, monkeypatch, "step", 7)
    seconds = leave(tmp_path, monkeypatch, command="true", timeout_seconds=0.5)
    alert = 0.5
    assert seconds >= (SILENT_INTERVALS + SPEAKER_INTERVALS) * 0.3 + alert, "it has not waited for rank 0"
    assert read_events(tmp_path) == []


def test_a_rank_that_gives_no_sign_of_life_does_not_speak_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in the same step, and is the lowest."""
    silent = {"rank": 0, "host": "node", "pid": 5, "activity": "step", "step": 7}
    Heartbeat(tmp_path, 0).write(silent)
    leave(tmp_path, monkeypatch)
    (hang,) = read_events(tmp_path)
    assert hang["silent"] == [0]
    assert "step 7 has not ended within 2 s: no sign of life of rank 0 (process 5 on node)" in hang["text"]


def test_a_step_that_ends_after_all_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the signs of life of the others are compared."""
    forbid_to_leave(monkeypatch)
    hook = make_hook(tmp_path, HANGS)
    hook.begin("step", 7)
    monkeypatch.setattr(hook, "_stay", lambda seconds: hook.begin("after the step", 7))
    try:
        hook._end(hook._activity)
    finally:
        hook.close(failed=False)
    assert read_events(tmp_path) == []


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_starts_again_and_finishes(tmp_path: Path, corpus: Path) -> None:
    """Rank 1 of three is stopped: the others say so within the limit, torchrun starts all again."""
    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    more = ["engine=ddp", "training.global_batch_size=6", "training.total_steps=60", "checkpoint.interval_steps=10"]

    # Whoever speaks leaves three intervals after it has found the hang: so much later may the other one.
    more += [*QUICK, "watchdog.heartbeat_seconds=1"]

    def run(folder: Path, *script: str) -> str:
        launcher = torchrun(3, *script, *overrides(corpus, folder, *more))
        done = subprocess.run(
            [*launcher[:3], "--max-restarts=2", *launcher[3:]],
            cwd=REPOSITORY, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    run(plain, str(REPOSITORY / "train.py"))
    # In a step: a save or a validation may take far longer before it is a hang.
    log = run(run_dir, str(REPOSITORY / "tests" / "distributed" / "stopping_rank.py"), "1", "13")
    [stopped] = re.findall(r"stopped: (process \d+)", log)
    (hang,) = [event for event in read_events(run_dir) if event["kind"] == "hang"]
    assert hang["silent"] == [1]
    assert f"no sign of life of rank 1 ({stopped} on " in hang["text"]
    written = sorted(path.name for path in (run_dir / "hangs").glob("step_*.txt"))
    assert [name.split("rank_")[1] for name in written] == ["00000.txt", "00002.txt"]
    assert "in _step" in (run_dir / "hangs" / written[0]).read_text()
    record = json.loads((run_dir / "hangs" / written[0]).with_suffix(".collectives.json").read_text())
    assert record["entries"][-1]["profiling_name"].endswith("all_reduce"), "what it waits in"
    assert record["entries"][-1]["timeout_ms"] > 1000 * data_limit_seconds(Config(data=DataConfig(source="stream")))
    keys = ("step", "loss", "grad_norm", "lr")
    ours, theirs = ([[r[key] for key in keys] for r in metrics(folder)] for folder in (run_dir, plain))
    assert ours == theirs
    assert json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[0])["kind"] == "start"


SLOW_RANK = str(REPOSITORY / "tests" / "distributed" / "slow_rank.py")
# Rank 1 waits for its data in each step, for longer than a step may take.
LATE_DATA = ["engine=ddp", "training.global_batch_size=4", "training.total_steps=3", *QUICK]


def late_data(run_dir: Path, corpus: Path, seconds: float, *more: str) -> list[str]:
    more = ("schedule.warmup_steps=1", *more)
    return torchrun(2, SLOW_RANK, "data", "1", str(seconds), *overrides(corpus, run_dir, *LATE_DATA, *more))


@pytest.mark.slow
def test_ranks_wait_for_one_that_waits_for_its_data(tmp_path: Path, corpus: Path) -> None:
    command = late_data(tmp_path / "run", corpus, 6, "watchdog.data_seconds=60")
    result = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["start", "finished"]


@pytest.mark.slow
def test_a_rank_whose_data_does_not_come_says_so(tmp_path: Path, corpus: Path) -> None:
    command = late_data(tmp_path / "run", corpus, 100, "watchdog.data_seconds=8", "watchdog.first_step_seconds=10")
    result = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode != 0
    assert "the data of step 1 has not come within 10 s (watchdog.data_seconds) to rank 1 on" in result.stderr
    (hang,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "hang"]
    assert hang["silent"] == []


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_waits_for_its_data_is_named(tmp_path: Path, corpus: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            late_data(run_dir, corpus, 30, "watchdog.data_seconds=600", "watchdog.first_step_seconds=5"),
            cwd=REPOSITORY, env=child_environment(), stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
    beats = wait_for(lambda: (b := read_heartbeats(run_dir)).get(1, {}).get("activity") == "data of step" and b)
    os.kill(beats[1]["pid"], signal.SIGSTOP)
    (hang,) = wait_for(lambda: [event for event in read_events(run_dir) if event["kind"] == "hang"])
    assert hang["silent"] == [1]
    assert "step 1 has not ended within 5 s: no sign of life of rank 1" in hang["text"]
    assert process.wait(120) != 0, log.read_text()[-3000:]


@pytest.mark.slow
def test_a_start_up_that_hangs_is_ended_too(tmp_path: Path, corpus: Path) -> None:
    more = overrides(
        corpus, tmp_path / "run", *LATE_DATA, "schedule.warmup_steps=1", "watchdog.between_steps_seconds=5",
        "watchdog.heartbeat_seconds=1",  # the ranks do not start at the same time
    )  # fmt: skip
    command = torchrun(2, SLOW_RANK, "start", "1", "100", *more)
    result = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=200
    )
    assert "error: start has not ended within 5 s" in result.stderr
    names = {path.name for path in (tmp_path / "run" / "hangs").iterdir()}
    assert {"step_00000000_rank_00000.txt", "step_00000000_rank_00001.txt"} <= names


@pytest.mark.slow
def test_a_start_up_that_fails_leaves_no_sign_of_life(tmp_path: Path, corpus: Path) -> None:
    short = [*LATE_DATA, "schedule.warmup_steps=1"]
    for more, code in (([], 0), (["model.d_state=8"], 1)):  # that is not the checkpoint's
        command = torchrun(2, str(REPOSITORY / "train.py"), *overrides(corpus, tmp_path / "run", *short, *more))
        result = subprocess.run(
            command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=200
        )
        assert result.returncode == code, result.stderr[-3000:]
    assert "model.d_state was 4, is 8" in result.stderr
    assert not list((tmp_path / "run").glob(f"{FOLDER}/*"))
