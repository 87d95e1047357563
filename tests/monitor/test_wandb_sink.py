"""wandb offline: what is recorded, that a resume is the same run, and that it can never stop training."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_train.config import LoggingConfig, WandbMode
from mamba_train.monitor import wandb_sink
from mamba_train.monitor.wandb_sink import WandbSink, resolve_mode

CONFIG = {"model": {"name": "mamba_tiny"}, "data": {"hf_token": "hunter2"}}
OFFLINE = LoggingConfig(wandb=WandbMode.offline)


@pytest.fixture(autouse=True)
def no_wandb_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's login nor its settings take part, and nothing can leave it."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    # The service of this process serves all tests of this file.
    monkeypatch.setattr(wandb_sink, "_abandon_service", lambda: None)


@pytest.fixture
def warnings() -> list[str]:
    return []


def records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The records of all wandb runs below run_dir, oldest run first."""
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        yield from map(json.loads, output.splitlines())


def history(run_dir: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records(run_dir) if record["type"] == "history"]


def test_offline_run_records_every_metric_by_our_step(tmp_path: Path, warnings: list[str]) -> None:
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, None, warnings.append)
    sink.log({"step": 101, "tokens": 2048, "loss": 2.5, "skipped": False, "mfu": None, "ssm/layer_00/a_min": -16.0})
    sink.log({"step": 102, "tokens": 4096, "loss": math.nan, "skipped": True})
    sink.finish(0)
    assert warnings == []
    first, second = history(tmp_path)
    assert (first["step"], first["tokens"], first["loss"], first["skipped"]) == (101, 2048, 2.5, 0)
    assert first["ssm/layer_00/a_min"] == -16.0
    assert "mfu" not in first
    assert first["_step"] == 101
    assert (second["step"], second["skipped"]) == (102, 1)


def test_an_event_is_an_alert_of_the_run(tmp_path: Path, warnings: list[str]) -> None:
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, None, warnings.append)
    sink.log({"step": 1})
    sink.alert("rollback", "back to the checkpoint of step 10")
    sink.log({"step": 2})
    sink.finish(0)
    assert warnings == []
    alerts = [record["alert"] for record in records(tmp_path) if record["type"] == "alert"]
    assert [(alert["title"], alert["text"]) for alert in alerts] == [("rollback", "back to the checkpoint of step 10")]
    assert [item["step"] for item in history(tmp_path)] == [1, 2]


def test_a_resume_goes_on_in_the_same_run_and_overlapping_steps_are_kept(tmp_path: Path, warnings: list[str]) -> None:
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, None, warnings.append)
    for step in (1, 2, 3):
        sink.log({"step": step})
    sink.finish(1)
    resumed = WandbSink(tmp_path, OFFLINE, CONFIG, sink.run_id, warnings.append)
    for step in (2, 3, 4):
        resumed.log({"step": step})
    resumed.finish(0)
    assert resumed.run_id == sink.run_id
    assert warnings == []
    assert {path.name for path in (tmp_path / "wandb").glob("*/*.wandb")} == {f"run-{sink.run_id}.wandb"}
    assert sorted(row["step"] for row in history(tmp_path)) == [1, 2, 2, 3, 3, 4]


def test_a_step_behind_wandbs_counter_is_still_recorded(tmp_path: Path, warnings: list[str]) -> None:
    # An online run that is resumed from an earlier checkpoint starts with its counter ahead of ours.
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, None, warnings.append)
    for step in (150, 101, 102):
        sink.log({"step": step})
    sink.finish(0)
    assert [row["step"] for row in history(tmp_path)] == [150, 101, 102]


def test_the_x_axis_is_step_and_the_config_has_no_credentials(tmp_path: Path, warnings: list[str]) -> None:
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, None, warnings.append)
    sink.log({"step": 1, "loss": 1.0})
    sink.finish(0)
    text = json.dumps(list(records(tmp_path)))
    assert "mamba_tiny" in text
    assert "hunter2" not in text
    assert b"hunter2" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    axes = [record["metric"] for record in records(tmp_path) if record["type"] == "metric"]
    assert any(axis.get("glob_name") == "*" and axis.get("step_metric") == "step" for axis in axes)


def test_disabled_does_not_import_wandb_and_keeps_the_run_id(tmp_path: Path) -> None:
    code = """
import sys
import threading
import time
from pathlib import Path
from mamba_train.config import LoggingConfig, WandbMode
from mamba_train.monitor.wandb_sink import WandbSink
sink = WandbSink(Path(sys.argv[1]), LoggingConfig(wandb=WandbMode.disabled), {}, "abc")
sink.log({"step": 1})
sink.finish(0)
assert sink.run_id == "abc"
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert not (tmp_path / "wandb").exists()


class Failing:
    """Stands in for a wandb run whose `fails` method raises."""

    id = "abc"
    step = 0

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError("the tracker\nbroke")

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        self._call("define_metric")

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._call("log")

    def finish(self, **kwargs: Any) -> None:
        self._call("finish")


@pytest.mark.parametrize("fails", ["define_metric", "log", "finish"])
def test_an_exception_is_one_warning_and_then_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], fails: str
) -> None:
    run = Failing(fails)
    monkeypatch.setattr(wandb_sink, "_init", lambda start, mode: run)
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, "abc", warnings.append)
    sink.log({"step": 1})
    sink.log({"step": 2})
    sink.finish(1)
    assert len(warnings) == 1
    assert "the tracker broke" in warnings[0]
    assert run.calls.count(fails) == 1
    assert sink.run_id == "abc"


@pytest.mark.parametrize("hangs", ["define_metric", "log", "finish"])
def test_a_tracker_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], hangs: str
) -> None:
    release = threading.Event()

    class Hanging(Failing):
        def _call(self, name: str) -> None:
            if name == hangs:
                release.wait(60)

    run = Hanging("nothing")
    monkeypatch.setattr(wandb_sink, "_init", lambda start, mode: run)
    monkeypatch.setattr(wandb_sink, "FINISH_TIMEOUT_SECONDS", 0.5)
    abandoned: list[bool] = []
    monkeypatch.setattr(wandb_sink, "_abandon_service", lambda: abandoned.append(True))
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, "abc", warnings.append)
    for step in range(1, 1001):
        sink.log({"step": step})
    sink.finish(0)
    assert len(warnings) == 1
    assert "has not finished" in warnings[0]
    assert abandoned == [True]
    release.set()
    sink._thread.join(60)


def test_records_that_find_no_room_behind_a_hang_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    release = threading.Event()
    monkeypatch.setattr(wandb_sink, "_init", lambda start, mode: release.wait(60))
    monkeypatch.setattr(wandb_sink, "_abandon_service", lambda: None)
    monkeypatch.setattr(wandb_sink, "FINISH_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(wandb_sink, "QUEUED_RECORDS", 10)
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, "abc", warnings.append)

    def train() -> None:
        for step in range(1, 101):
            sink.log({"step": step})
        sink.finish(0)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    training.join(30)
    assert not training.is_alive()
    release.set()
    sink._thread.join(60)  # else it may abandon, in earnest, the service of the next test


def test_a_hang_is_said_while_the_training_goes_on_and_nothing_is_lost_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(Failing):
        def log(self, *args: Any, **kwargs: Any) -> None:
            entered.set()
            release.wait(60)
            super().log()

    run = Slow("nothing")
    monkeypatch.setattr(wandb_sink, "_init", lambda start, mode: run)
    monkeypatch.setattr(wandb_sink, "STALL_SECONDS", 0.1)
    sink = WandbSink(tmp_path, OFFLINE, CONFIG, "abc", warnings.append)
    sink.log({"step": 1})
    assert entered.wait(60)
    while not warnings:
        sink.log({"step": 2})
        time.sleep(0.05)
    n_records = sink._queue.qsize() + 1
    assert "has not answered" in warnings[0]
    release.set()
    sink.finish(0)
    assert len(warnings) == 1
    assert run.calls.count("log") == n_records


def test_the_command_that_uploads(tmp_path: Path, warnings: list[str]) -> None:
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    sink = WandbSink(run_dir, OFFLINE, CONFIG, None, warnings.append)
    assert len(sink.run_id or "") == 8, "known at once, for the checkpoint"
    sink.finish(0)
    assert sink.upload_command == f"mamba-train upload '{run_dir}'"
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_wandb_that_cannot_be_imported_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = WandbSink(tmp_path, LoggingConfig(wandb=WandbMode.auto), CONFIG, "abc", warnings.append)
    sink.log({"step": 1})
    sink.finish(0)
    assert len(warnings) == 1
    assert sink.run_id == "abc"


def test_an_unreachable_server_means_recording_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)  # the server of these tests is a closed port
    init = wandb_sink._init

    def init_impatiently(start: dict[str, Any], mode: Any) -> Any:
        with monkeypatch.context() as patch:
            if mode == "online":  # offline, a busy machine may take longer
                patch.setattr(wandb_sink, "INIT_TIMEOUT_SECONDS", 1.0)
            return init(start, mode)

    monkeypatch.setattr(wandb_sink, "_init", init_impatiently)
    sink = WandbSink(tmp_path, LoggingConfig(wandb=WandbMode.auto), CONFIG, "abc", warnings.append)
    sink.log({"step": 7})
    sink.finish(0)
    assert sink.mode is WandbMode.offline
    assert len(warnings) == 1
    assert "cannot start online" in warnings[0]
    assert sink.run_id == "abc"
    assert [row["step"] for row in history(tmp_path)] == [7]


def test_online_without_a_login_never_asks_but_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    modes = []
    monkeypatch.setattr(wandb_sink, "_init", lambda start, mode: modes.append(mode) or Failing("nothing"))
    WandbSink(tmp_path, LoggingConfig(wandb=WandbMode.online), CONFIG, None, warnings.append).finish()
    assert modes == ["offline"]
    assert "wandb login" in warnings[0]


@pytest.mark.parametrize(
    ("value", "mode"),
    [("offline", "offline"), ("dryrun", "offline"), ("ONLINE", "online"), ("disabled", "disabled"), ("", "offline")],
)
def test_auto_follows_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    assert resolve_mode(WandbMode.auto) == mode
    assert resolve_mode(WandbMode.online) == "online"


def test_auto_is_online_with_a_key_in_the_environment_or_in_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_mode(WandbMode.auto) == "offline"
    (tmp_path / "netrc").write_text("machine other.example\n login user\n password secret\n")
    assert resolve_mode(WandbMode.auto) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password secret\n")
    assert resolve_mode(WandbMode.auto) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode(WandbMode.auto) == "online"


def test_a_service_that_died_at_the_start_means_recording_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    from wandb.sdk import wandb_setup

    init = wandb_sink._init

    def die_online(start: dict[str, Any], mode: Any) -> Any:
        if mode == "online":
            service: Any = wandb_setup.singleton().ensure_service()
            service._proc._process.kill()
            service._proc._process.wait()
            raise RuntimeError("the service died")
        return init(start, mode)

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb_sink, "_init", die_online)
    sink = WandbSink(tmp_path, LoggingConfig(wandb=WandbMode.auto), CONFIG, "abc", warnings.append)
    sink.log({"step": 7})
    sink.finish(0)
    assert sink.mode is WandbMode.offline
    assert len(warnings) == 1
