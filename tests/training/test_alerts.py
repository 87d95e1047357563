"""The command of the user's: it hears of what matters, and whatever it does the training goes on."""

import os
import queue
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mamba_train.composition import compose_config
from mamba_train.config import AlertsConfig
from mamba_train.monitor.event_log import EventLog, append, read_events
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.alerts import Alerts
from mamba_train.training.preemption import Stopped
from tests.helpers import REPOSITORY, environment, train_command
from tests.training.test_preemption import AskedAt
from tests.training.test_rollback import GUARD
from tests.training.test_trainer import Poison, make_config


def test_a_command_hears_of_a_rollback_a_stop_and_the_end(tmp_path: Path, corpus: Path) -> None:
    told = tmp_path / "told"
    line = f"echo $MAMBA_TRAIN_EVENT $MAMBA_TRAIN_EVENT_STEP $MAMBA_TRAIN_EVENT_RUN_DIR >> {told}"
    config = make_config(tmp_path / "run", corpus, *GUARD)
    config.alerts.command = line
    trainer = build_trainer(config, AskedAt(20))
    trainer.hooks = [Poison({12, 13, 14}), *trainer.hooks]
    with pytest.raises(Stopped):
        trainer.run()
    build_trainer(config).run()
    run_dir = tmp_path / "run"
    lines = told.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["rollback", "stopped", "finished"]
    assert (lines[0], lines[2]) == (f"rollback 14 {run_dir}", f"finished 30 {run_dir}")
    kinds = [event["kind"] for event in read_events(run_dir)]
    assert kinds == ["start", "skip", "skip", "skip", "rollback", "stopped", "start", "finished"]


@pytest.mark.parametrize(
    ("command", "seconds", "said"),
    [
        ("sleep 300", 0.5, "did not end within 0.5 s"),
        ("sleep 300 & wait", 0.5, "did not end within 0.5 s"),
        ("echo the server says no >&2; exit 7", 60.0, "ended with 7 (rollback): the server says no"),
        ("no_such_command_anywhere", 60.0, "ended with 127"),
    ],
)
def test_a_command_that_fails_or_hangs_costs_a_line_in_the_log(
    tmp_path: Path, command: str, seconds: float, said: str
) -> None:
    log: queue.Queue[str] = queue.Queue()
    alerts = Alerts(AlertsConfig(command, timeout_seconds=seconds), tmp_path, log.put)
    alerts.on_event({"kind": "rollback", "text": "back", "step": 3})
    alerts.wait()
    assert said in log.get(timeout=60)  # a shell may take longer to start than the second that `wait` gives it
    assert log.empty()


def test_the_training_does_not_wait_for_a_command(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    log: list[str] = []
    alerts = Alerts(AlertsConfig(f"cat {tmp_path}/held > {tmp_path}/told", timeout_seconds=60.0), tmp_path, log.append)
    alerts.on_event({"kind": "rollback", "text": "back", "step": 3})
    (tmp_path / "held").write_text("after that")
    alerts.wait()
    assert (tmp_path / "told").read_text() == "after that"
    assert log == []


def test_what_nobody_needs_to_know_at_once_is_not_sent(tmp_path: Path) -> None:
    alerts = Alerts(AlertsConfig(f"touch {tmp_path}/told"), tmp_path, print)
    alerts.on_event({"kind": "skip", "text": "step 3 is skipped", "step": 3})
    alerts.wait()
    assert not (tmp_path / "told").exists()


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.add("start", "starts")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"kind": "sk')
    log.add("finished", "finished")
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "finished"]


def test_a_disk_that_is_full_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    heard: list[str] = []
    log = EventLog(tmp_path, warnings.append)
    log.listeners.append(lambda event: heard.append(event["kind"]))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mamba_train.monitor.event_log.append", full)
    log.add("skip", "a")
    log.add("skip", "b")
    assert len(warnings) == 1
    assert heard == ["skip", "skip"]
    assert append is not full


def test_the_command_in_the_documentation_is_one_that_hydra_takes() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("python train.py") and "alerts.command" in line]
    (override,) = [word for word in shlex.split(line) if word.startswith("alerts.command=")]
    command = compose_config([override]).alerts.command
    assert command is not None
    assert shlex.split(command)[-1] == "$WEBHOOK_URL"


def test_ctrl_c_is_a_stop_and_no_failure(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        train_command(run_dir, corpus, "training.total_steps=100000"), cwd=REPOSITORY, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not ((file := run_dir / "metrics.jsonl").exists() and file.stat().st_size):  # a step is done
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1].split(":")[0]) == (1, "interrupted"), said
    assert "Ctrl-C: leaving at the end of this step; a second one does not wait for it\n" in said
    assert [event["kind"] for event in read_events(run_dir)] == ["start", "stopped"]
