"""A step that hangs is noticed, described and ended; one that is slow within its limit is left alone."""

import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mamba_train.config import Config, WatchdogConfig, data_limit_seconds
from mamba_train.config_data import DataConfig, DataSource
from mamba_train.monitor.event_log import read_events
from mamba_train.monitor.heartbeat import FOLDER, Heartbeat, forget_ranks, read_heartbeats
from mamba_train.training.hooks import watchdog
from mamba_train.training.preemption import EXIT_RESTART
from tests.distributed.launch import child_environment
from tests.helpers import REPOSITORY, metrics, train_command
from tests.training.watching import QUICK, make_hook, wait_for

# Run by python -c: train.py whose step 5 sleeps in the place that is said: in Python, with the interpreter's lock, in
# many short sleeps, or where it waits for its data.
HANGING = """
import ctypes, sys, time
from pathlib import Path
from mamba_train.monitor.heartbeat import read_heartbeats
from mamba_train.training.trainer import Trainer
step = Trainer._step
where, seconds = sys.argv.pop(1), float(sys.argv.pop(1))
def hang():
    if where == "work":
        for _ in range(int(10 * seconds)):  # unlike one sleep, it goes on where it was when it had been stopped
            time.sleep(0.1)
    elif where != "lock":
        time.sleep(seconds)
    else:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL keeps the lock
def wait_for_the_watchdog(run_dir):
    signs = set()
    while len(signs) < 2:  # at the second one, all that belongs to the first is done
        signs |= {of["time"] for of in read_heartbeats(run_dir).values() if (of["activity"], of["step"]) == ("step", 5)}
        time.sleep(0.01)
def hanging(trainer):
    if trainer.state.step == 4 and where == "data":
        take = trainer.loader._step
        trainer.loader._step = lambda sample: (time.sleep(seconds), take(sample))[1]
    elif trainer.state.step == 4:
        wait_for_the_watchdog(Path(trainer.config.run_dir))
        hang()
    return step(trainer)
Trainer._step = hanging
from mamba_train.training.hooks import watchdog
watchdog.BACKSTOP_SECONDS = 2.0
import runpy
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def hanging(where: str, seconds: float, run_dir: Path, corpus: Path, *more: str) -> list[str]:
    arguments = train_command(run_dir, corpus)[2:]
    return [sys.executable, "-c", HANGING, where, str(seconds), *arguments, *QUICK, "training.total_steps=8", *more]


def run_hanging(
    where: str, seconds: float, run_dir: Path, corpus: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        hanging(where, seconds, run_dir, corpus, *more),
        cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_step_that_hangs_ends_with_stacks_an_alert_and_a_restart(tmp_path: Path, corpus: Path) -> None:
    told = tmp_path / "told"
    alert = f"alerts.command='echo $MAMBA_TRAIN_EVENT $MAMBA_TRAIN_EVENT_STEP >> {told}'"
    result = run_hanging("python", 60, tmp_path / "run", corpus, alert)
    assert result.returncode == EXIT_RESTART, result.stderr
    assert "error: step 5 has not ended within 4 s" in result.stderr
    (hang,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "hang"]
    assert hang["step"] == 5
    stacks = (tmp_path / "run" / "hangs" / "step_00000005_rank_00000.txt").read_text()
    assert hang["files"] == ["step_00000005_rank_00000.txt"], "a single process has no collective operations"
    assert "in hang" in stacks
    assert "in _watch" in stacks
    assert told.read_text() == "hang 5\n"


def test_a_call_that_keeps_the_interpreter_to_itself_is_ended_too(tmp_path: Path, corpus: Path) -> None:
    result = run_hanging("lock", 30, tmp_path / "run", corpus)
    assert result.returncode == 1, result.stderr
    (stacks,) = (tmp_path / "run" / "hangs").iterdir()
    assert "in hang" in stacks.read_text()


def test_a_call_that_keeps_the_interpreter_to_itself_has_its_time_too(tmp_path: Path, corpus: Path) -> None:
    """Longer than the signs of life are apart, and no longer than the step may take."""
    result = run_hanging("lock", 5, tmp_path / "run", corpus, "watchdog.step_seconds=60")
    assert result.returncode == 0, result.stderr


OVER = """
import sys, time
from pathlib import Path
from torch.distributed import HashStore
from mamba_train.config import AlertsConfig, WatchdogConfig
from mamba_train.ranks import Launch, Ranks
from mamba_train.training.hooks import watchdog
from mamba_train.training.hooks.alerts import Alerts
watchdog.BACKSTOP_SECONDS = 3.0
run_dir = Path(sys.argv[1])
alerts = Alerts(AlertsConfig(), run_dir, print)
hook = watchdog.WatchdogHook(run_dir, WatchdogConfig(), 60.0, Ranks(Launch(), HashStore()), alerts)
hook._set_backstop(0.0)
hook.close(failed=False)
time.sleep(4)
"""


def test_a_run_that_is_over_is_not_ended_any_more(tmp_path: Path) -> None:
    """By what should have ended it if its last thread had not come back."""
    result = subprocess.run([sys.executable, "-c", OVER, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_slow_step_is_left_alone_and_nothing_is_left_behind(tmp_path: Path, corpus: Path) -> None:
    result = run_hanging("python", 0.5, tmp_path / "run", corpus, "watchdog.step_seconds=20")
    assert result.returncode == 0, result.stderr
    assert len(metrics(tmp_path / "run")) == 8
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["start", "finished"]
    assert list((tmp_path / "run" / "hangs").iterdir()) == []
    assert list((tmp_path / "run" / FOLDER).iterdir()) == []


def test_waiting_for_data_has_a_limit_of_its_own(tmp_path: Path, corpus: Path) -> None:
    patient = run_hanging("data", 8, tmp_path / "patient", corpus, "watchdog.data_seconds=60", "training.total_steps=5")
    assert patient.returncode == 0, patient.stderr
    assert [event["kind"] for event in read_events(tmp_path / "patient")] == ["start", "finished"]
    result = run_hanging("data", 60, tmp_path / "run", corpus, "watchdog.data_seconds=3", "watchdog.step_seconds=50")
    assert result.returncode == EXIT_RESTART, result.stderr
    assert "error: the data of step 5 has not come within 3 s (watchdog.data_seconds) to rank 0 on" in result.stderr
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["start", "hang"]


def test_a_step_has_its_whole_time_after_its_data_have_come(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, WatchdogConfig(step_seconds=2.0))
    hook.begin("step", 7)
    began = hook._now().since
    loader: Any = SimpleNamespace(waiting_since=began + 1, came_at=0.0)
    hook._loader = loader
    now = hook._now()
    assert (now.name, now.step, now.since, now.limit_seconds) == ("data of step", 7, began + 1, 60.0)
    loader.waiting_since, loader.came_at = None, began + 50
    now = hook._now()
    assert (now.name, now.step, now.since, now.limit_seconds) == ("step", 7, began + 50, 2.0)
    hook.begin("after the step", 7)
    assert hook._now().since < began + 50


def test_each_activity_has_its_limit(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, WatchdogConfig(first_step_seconds=3.0, step_seconds=1.0, between_steps_seconds=2.0))
    found = [("start", hook._now().limit_seconds)]
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=4))
    hook.first_step = 4
    for begin in (hook.on_step, hook.at_end.on_step):
        begin(trainer, {})
        found.append((hook._now().name, hook._now().limit_seconds))
    for stop in (hook.on_stop, hook.on_end):
        stop(trainer)
        found.append((hook._now().name, hook._now().limit_seconds))
    hook.begin("first step", 4)
    found.append(("first step", hook._now().limit_seconds))
    assert found == [
        ("start", 2.0), ("after the step", 2.0), ("step", 1.0), ("stopping", 2.0), ("finishing", 2.0),
        ("first step", 3.0),
    ]  # fmt: skip


def test_a_start_forgets_the_ranks_that_there_are_no_more(tmp_path: Path) -> None:
    for rank in (1, 2):
        Heartbeat(tmp_path, rank).write({"rank": rank})
    make_hook(tmp_path, WatchdogConfig(enabled=False)).start()
    assert list(read_heartbeats(tmp_path)) == [1]


def test_nobody_watches_where_the_watchdog_is_off(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, WatchdogConfig(enabled=False))
    hook.start()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    hook.close(failed=False)
    assert list(tmp_path.iterdir()) == []


def test_the_time_in_which_a_process_was_stopped_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    hook = make_hook(tmp_path, WatchdogConfig(heartbeat_seconds=1.0, step_seconds=60.0))
    hook.begin("step", 7)

    def stop(seconds: float) -> None:
        clock[0] += seconds
        hook._excuse(seconds, pause=1.0)

    stop(0.9)
    assert hook._now().since == 0, "a busy machine, no more"
    for stops in (1, 2):
        stop(30.0)
        assert hook._now().since == 30 * stops
    waiting: Any = SimpleNamespace(waiting_since=clock[0], came_at=0.0)
    hook._loader = waiting
    assert hook._now().name == "data of step"
    assert hook._now().since == waiting.waiting_since, "that was before it waited"
    stop(30.0)
    assert hook._now().since == waiting.waiting_since + 30
    hook.begin("after the step", 7)
    assert hook._now().since == hook._activity.since


def test_a_stop_says_nothing_of_what_has_begun_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a process goes on, its main thread may end a step before the watching one knows of the stop."""
    clock = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    hook = make_hook(tmp_path, WatchdogConfig(heartbeat_seconds=1.0, step_seconds=60.0))
    hook.begin("step", 7)
    clock[0] = 3600.0
    hook.begin("after the step", 7)
    clock[0] += 0.5
    hook._excuse(3600.0, pause=1.0)
    assert hook._now().since <= clock[0], "a hang of it would be told an hour late"


def test_a_process_that_was_stopped_while_it_gave_a_sign_of_life_is_left_alone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, found = [0.0], list[float]()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    hook = make_hook(tmp_path, WatchdogConfig(heartbeat_seconds=1.0, step_seconds=60.0))
    hook.begin("step", 7)
    beats, closed = iter([100.0] + 99 * [0.0]), iter(99 * [False] + [True])

    def beat() -> None:
        clock[0] += next(beats)

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        return next(closed)

    monkeypatch.setattr(hook, "_beat", beat)
    monkeypatch.setattr(hook, "_end", lambda activity: found.append(clock[0]))
    monkeypatch.setattr(hook, "_set_backstop", lambda seconds: None)
    monkeypatch.setattr(hook, "_closed", SimpleNamespace(wait=wait))
    hook._watch()
    assert found[0] == 100 + 61, "its time without the stop, and no more"


@pytest.mark.slow
def test_a_process_that_goes_on_after_it_was_stopped_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    """Its step has taken longer than it may, all in all; a second hang must not be told when SLURM wakes it."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        hanging("work", 3, run_dir, corpus, "watchdog.step_seconds=6"),
        cwd=REPOSITORY, env=child_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (of := read_heartbeats(run_dir).get(0)) and (of["activity"], of["step"]) == ("step", 5))
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [event["kind"] for event in read_events(run_dir)] == ["start", "finished"]


def test_a_stream_may_be_as_patient_as_it_says(tmp_path: Path) -> None:
    config = Config(data=DataConfig(source=DataSource.shards), watchdog=WatchdogConfig(step_seconds=300.0))
    assert data_limit_seconds(config) == 300.0
    config.data = DataConfig(source=DataSource.stream, network_retries=2, network_timeout_seconds=60.0)
    assert data_limit_seconds(config) == 2 * 600 + 3 * 60
    config.watchdog.data_seconds = 1000.0
    assert data_limit_seconds(config) == 1000.0


def test_a_heartbeat_is_replaced_whole(tmp_path: Path) -> None:
    heartbeats = [Heartbeat(tmp_path, rank) for rank in (0, 3)]
    for number in (100_000, 7):
        for rank, heartbeat in zip((0, 3), heartbeats, strict=True):
            heartbeat.write({"rank": rank, "step": number})
    assert {rank: (of["rank"], of["step"]) for rank, of in read_heartbeats(tmp_path).items()} == {0: (0, 7), 3: (3, 7)}
    forget_ranks(tmp_path, 2)
    assert list(read_heartbeats(tmp_path)) == [0]
    heartbeats[0].close()
    assert read_heartbeats(tmp_path) == {}


def test_there_is_time_to_say_it_before_the_backstop(tmp_path: Path, corpus: Path) -> None:
    """Watching the others takes longer than the backstop is set to."""
    result = run_hanging("python", 60, tmp_path / "run", corpus, "watchdog.heartbeat_seconds=1")
    assert result.returncode == EXIT_RESTART, result.stderr
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["start", "hang"]


def test_a_disk_that_fails_does_not_fail_the_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.write({"rank": 0})

    def read_only(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        heartbeat.close()
        forget_ranks(tmp_path, 0)
