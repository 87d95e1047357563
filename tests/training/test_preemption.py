"""Asked to stop in any phase, once or twice: the run ends as if it had never been asked, and repeats no saved step."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.checkpoint import NotEnoughDiskSpace, saving
from mamba_train.checkpoint.storage import complete_steps, load
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.preemption import EXIT_RESTART, Stopped, StopRequest
from tests.helpers import curve, environment, metrics, train, train_command
from tests.training.test_trainer import make_config

TOTAL_STEPS = 20
# Rare checkpoints, so that a stop that saves nothing is found out.
OVERRIDES = (f"training.total_steps={TOTAL_STEPS}", "checkpoint.interval_steps=5", "training.validation_sequences=8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(run_dir, corpus, *OVERRIDES).returncode == 0
    return curve(run_dir)


def start_held(phase: str, run_dir: Path, corpus: Path, *more: str) -> subprocess.Popen:
    """A run that has reached `phase` and waits there, in a process group of its own."""
    ready = run_dir.with_name("ready")
    overrides = train_command(run_dir, corpus, *OVERRIDES, *more)[2:]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("phases.py")), phase, str(ready), *overrides],
        cwd=corpus.parent,
        env={**environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not ready.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


ANY_STEP = -1  # that the training has reached meanwhile
# phase -> (saved by the stop, recorded when it stopped)
PHASES = {
    "data_preparation": (None, 0),
    "compilation": (None, 0),
    "between_micro_batches": (7, 7),
    "validation": (10, 9),
    "last_validation": (20, 19),
    "save": (ANY_STEP, ANY_STEP),
}
SIGNALS = {
    "USR1": [signal.SIGUSR1],
    "TERM": [signal.SIGTERM],
    "USR1, TERM": [signal.SIGUSR1, signal.SIGTERM],
    "USR1, USR1": [signal.SIGUSR1, signal.SIGUSR1],
}


def check_phase(phase: str, signals: str, tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    run_dir = tmp_path / "run"
    process = start_held(phase, run_dir, corpus)
    asked_at = time.monotonic()
    for number in SIGNALS[signals]:
        process.send_signal(number)
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESTART, stderr
    assert time.monotonic() - asked_at < 50, "the process waited for what it was held in"
    assert "Traceback" not in stderr
    saved, recorded = PHASES[phase]
    checkpoints = run_dir / "checkpoints"
    steps = [record["step"] for record in metrics(run_dir)] if (run_dir / "metrics.jsonl").exists() else []
    if saved == ANY_STEP:
        saved = recorded = len(steps)
        assert complete_steps(checkpoints)[1] == 5, "the save that was in flight is complete too"
    assert (complete_steps(checkpoints)[0] if checkpoints.exists() else None) == saved
    assert steps == list(range(1, recorded + 1))
    again = train(run_dir, corpus, *OVERRIDES)
    assert again.returncode == 0, again.stderr
    assert curve(run_dir) == undisturbed
    assert not list(run_dir.glob("metrics.cut-*")), "a step that was saved has been done again"
    for record in metrics(run_dir):
        assert ("ssm/layer_01/dt_p50" in record) == (record["step"] == 1 or record["step"] % 10 == 0)
    if saved:
        assert f"resuming after step {saved} " in again.stdout


@pytest.mark.parametrize(
    ("phase", "signals"),
    [("data_preparation", "USR1"), ("between_micro_batches", "TERM"), ("validation", "USR1, TERM")],
)
def test_a_signal(phase: str, signals: str, tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    check_phase(phase, signals, tmp_path, corpus, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(
    phase: str, signals: str, tmp_path: Path, corpus: Path, undisturbed: list[tuple]
) -> None:
    check_phase(phase, signals, tmp_path, corpus, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["compilation", "between_micro_batches"])
def test_a_signal_to_all_processes_leaves_the_data_workers_alone(
    phase: str, tmp_path: Path, corpus: Path, undisturbed: list[tuple]
) -> None:
    """As SLURM sends it: to the workers, too, and to the tracker of what they share."""
    process = start_held(phase, tmp_path / "run", corpus, "data.workers=2", "data.prefetch_batches=1")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, number)
        time.sleep(0.05)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESTART, stderr
    assert not re.search("Traceback|has died", stderr)
    assert train(tmp_path / "run", corpus, *OVERRIDES, "data.workers=2").returncode == 0
    assert curve(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run").glob("metrics.cut-*"))


class AskedAt(StopRequest):
    """Is asked when it is looked at for the n-th time."""

    def __init__(self, look: int) -> None:
        super().__init__(environment={})
        self.looks_left = look

    def requested(self, step_seconds: float = 0.0, save_seconds: float = 0.0) -> bool:
        self.looks_left -= 1
        if self.looks_left <= 0:
            self.reason = "the test"
        return self.reason is not None


@settings(max_examples=4, deadline=None)
@given(looks=st.lists(st.integers(1, 12), max_size=4))
def test_stopped_anywhere_and_any_number_of_times(
    looks: list[int], corpus: Path, undisturbed: list[tuple], tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    config = make_config(run_dir, corpus, *OVERRIDES)
    for look in [*looks, 1000]:
        trainer = build_trainer(config, AskedAt(look))
        first = trainer.state.step
        with contextlib.suppress(Stopped):
            trainer.run()
        if trainer.state.step < TOTAL_STEPS:
            assert trainer.state.step > first or trainer.state.pending_metrics is not None
            assert complete_steps(run_dir / "checkpoints")[0] == trainer.state.step
    assert curve(run_dir) == undisturbed
    assert not list(run_dir.glob("metrics.cut-*"))


def test_a_kill_after_a_stop_in_the_validation(tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    """The checkpoint that says "validation still to be done" is used twice: the record is there once."""
    run_dir = tmp_path / "run"
    config = make_config(run_dir, corpus, *OVERRIDES)
    # Ten steps and the second look of the validation.
    with pytest.raises(Stopped):
        build_trainer(config, AskedAt(12)).run()
    assert load(run_dir / "checkpoints" / "step_00000010").state["train"]["pending_metrics"]["step"] == 10

    class Killed(Exception):
        pass

    trainer = build_trainer(make_config(run_dir, corpus, *OVERRIDES, "checkpoint.keep_best=false"))
    step = trainer._step

    def step_then_die() -> dict:
        if trainer.state.step == 12:
            raise Killed
        return step()

    trainer._step = step_then_die  # type: ignore[method-assign]
    # Left undone: the save of step 10, which would replace the checkpoint.
    trainer.hooks = [hook for hook in trainer.hooks if not isinstance(hook, CheckpointHook)]
    with pytest.raises(Killed):
        trainer.run()
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 13))
    assert train(run_dir, corpus, *OVERRIDES).returncode == 0
    assert curve(run_dir) == undisturbed


def test_a_request_on_another_rank_stops_this_one(tmp_path: Path, corpus: Path) -> None:
    trainer = build_trainer(make_config(tmp_path / "run", corpus, *OVERRIDES))
    reduced: list[torch.Tensor] = []

    def with_another_rank(value: torch.Tensor) -> torch.Tensor:
        reduced.append(value)
        # At the end of step 3 the other rank has been asked; its loss and gradient are 0 here.
        is_end_of_step_3 = len(reduced) == 6
        return value + torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) if is_end_of_step_3 else value

    trainer.engine.sum_over_ranks = with_another_rank  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=r"after step 3.*another rank"):
        trainer.run()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]
    assert len(reduced) == 2 * 3, "a step makes two reductions, as it did without preemption"


def test_what_a_save_took_is_reckoned_with_from_then_on(tmp_path: Path, corpus: Path) -> None:
    asked_with: list[tuple[float, float]] = []

    class Listens(StopRequest):
        def requested(self, step_seconds: float = 0.0, save_seconds: float = 0.0) -> bool:
            asked_with.append((step_seconds, save_seconds))
            return False

    build_trainer(make_config(tmp_path / "run", corpus, *OVERRIDES), Listens({})).run()
    assert asked_with[0] == (0, 0)
    assert min(asked_with[-1]) > 0
    saved = load(tmp_path / "run" / "checkpoints" / f"step_{TOTAL_STEPS:08d}").state["train"]["save_seconds"]
    assert saved > 0, "and after a restart"


def test_the_time_limit_leaves_room_for_two_saves_and_a_step() -> None:
    now = [0.0]
    stop = StopRequest({"SLURM_JOB_END_TIME": "1000"}, clock=lambda: now[0])
    stop.first_step_done()
    for now[0], step, save, expected in [(0, 0, 0, False), (900, 8, 20, False), (923, 8, 20, True)]:
        assert stop.requested(step, save) is expected
    assert stop.reason == "the job's time limit is 77 s away"
    now[0] = 0
    assert stop.requested(), "once asked, always asked"
    for unknown in ({}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "UNLIMITED"}):
        assert not StopRequest(unknown, clock=lambda: 1e12).requested()


def test_the_time_limit_ends_in_a_save(tmp_path: Path, corpus: Path) -> None:
    result = subprocess.run(
        train_command(tmp_path / "run", corpus, "training.total_steps=5000", "schedule.warmup_steps=5"),
        cwd=corpus.parent,
        env={**environment(), "SLURM_JOB_END_TIME": str(int(time.time()) + 13)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == EXIT_RESTART, result.stderr
    assert "time limit" in result.stderr
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert complete_steps(tmp_path / "run" / "checkpoints")[0] == steps[-1]


CHILDREN = """
import multiprocessing, os, signal, sys, time
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.preemption import StopRequest
stop = StopRequest({})
stop.first_step_done()
stop.listen()
def with_a_handler(ready):
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(3))
    plain(ready)
def plain(ready):
    ready.set()
    time.sleep(60)
fork = multiprocessing.get_context("fork")
for target, exit_code in ((plain, -signal.SIGTERM), (with_a_handler, 3)):
    ready = fork.Event()
    child = fork.Process(target=target, args=(ready,))
    child.start()
    assert ready.wait(60)
    os.kill(child.pid, signal.SIGUSR1)
    time.sleep(0.3)
    assert child.is_alive() and stop.reason is None
    child.terminate()
    child.join(60)
    time.sleep(0.3)
    assert child.exitcode == exit_code and stop.reason is None, (child.exitcode, stop.reason)
os.kill(os.getpid(), signal.SIGUSR1)
end = time.monotonic() + 60
while stop.reason is None and time.monotonic() < end:
    time.sleep(0.01)
assert stop.reason == "SIGUSR1"
"""


def test_a_forked_child_neither_dies_of_usr1_nor_asks_the_run_to_stop(repository: Path) -> None:
    result = subprocess.run([sys.executable, "-c", CHILDREN], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


OTHER_SIGNALS = """
import os, signal, time
from mamba_train.training.preemption import StopRequest
stop = StopRequest({})
stop.listen()
seen = []
for number in (signal.SIGCHLD, signal.SIGALRM):  # of a worker that has ended, of a library
    signal.signal(number, lambda number, frame: seen.append(number))
    os.kill(os.getpid(), number)
    time.sleep(0.3)
assert seen == [signal.SIGCHLD, signal.SIGALRM] and stop.reason is None, (seen, stop.reason)
"""


def test_other_signals_are_no_request_to_stop(repository: Path) -> None:
    result = subprocess.run([sys.executable, "-c", OTHER_SIGNALS], cwd=repository, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


AT_THE_VERY_END = """
import os, signal
from mamba_train.training.preemption import StopRequest
StopRequest({}).listen()
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGUSR1, signal.SIGTERM)):
        for number in numbers:
            kill(pid, number)
late = Late()
"""


def test_a_signal_while_the_interpreter_shuts_down_does_not_make_a_failure_of_it(repository: Path) -> None:
    result = subprocess.run([sys.executable, "-c", AT_THE_VERY_END], cwd=repository, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_full_disk_at_the_stop_is_said_and_not_taken_for_success(tmp_path: Path, corpus: Path) -> None:
    environment_ = {**environment(), "SLURM_JOB_END_TIME": str(int(time.time()))}
    command = train_command(tmp_path / "run", corpus, *OVERRIDES, "checkpoint.reserve_gib=1e9")
    result = subprocess.run(command, cwd=corpus.parent, env=environment_, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "no space for a checkpoint" in result.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 1
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_disk_that_becomes_full_during_the_last_save_is_not_taken_for_success(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when the save began: its thread finds out, and the run must wait to hear of it."""

    def full(*args: object) -> None:
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_rank_files", full)
    with pytest.raises(NotEnoughDiskSpace):
        build_trainer(make_config(tmp_path / "run", corpus, *OVERRIDES), AskedAt(3)).run()
    assert complete_steps(tmp_path / "run" / "checkpoints") == []
