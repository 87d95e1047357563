"""A hang on GPUs: what torch's flight recorder has to say of NCCL, from a thread, while everything else waits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_train.checkpoint.storage import complete_steps
from mamba_train.monitor.event_log import read_events
from mamba_train.monitor.heartbeat import read_heartbeats
from tests.distributed.conftest import common, texts  # noqa: F401  fixtures
from tests.distributed.launch import child_environment, overrides, torchrun
from tests.helpers import REPOSITORY, metrics

pytestmark = pytest.mark.gpu
STEPS, SAVED = 1200, 500
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

# The main thread waits for the device, which sleeps for some seconds before the all-reduce; a thread takes the record.
ONE_RANK = """
import json, threading, time, torch
import torch.distributed as dist
from mamba_train.ranks import lone_group
from mamba_train.training.hooks.watchdog import flight_record
torch.cuda.set_device(0)
lone_group()
value = torch.ones(8, device="cuda")
dist.all_reduce(value)
torch.cuda.synchronize()
began, taken = time.monotonic(), []
def take():
    time.sleep(0.5)
    record = flight_record()
    taken.append((time.monotonic() - began, record))
thread = threading.Thread(target=take)
thread.start()
torch.cuda._sleep(int(6e9))
dist.all_reduce(value)
value.sum().item()
waited = time.monotonic() - began
thread.join()
seconds, record = taken[0]
entries = json.loads(record)["entries"]
print(json.dumps({"seconds": seconds, "waited": waited, "entries": entries}))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_record_is_taken_while_the_device_is_busy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", ONE_RANK], cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"record after {found['seconds']:.2f} s, device free after {found['waited']:.2f} s")
    print(json.dumps(found["entries"][-1])[:900])
    assert found["seconds"] < found["waited"], "it waited for the device"
    first, last = found["entries"][0], found["entries"][-1]
    assert first["profiling_name"] == last["profiling_name"] == "nccl:all_reduce"
    assert first["state"] == "completed"
    assert last["state"] != "completed"


def wait_for(condition: Any, process: "subprocess.Popen[Any]", log: Path, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, f"it did not happen: {log.read_text()[-3000:]}"
        time.sleep(0.05)
    return found


def begin(script: str, log: Path, *arguments: str, restarts: int = 0) -> "subprocess.Popen[Any]":
    launcher = torchrun(2, str(REPOSITORY / script), *arguments)
    command = [*launcher[:3], f"--max-restarts={restarts}", *launcher[3:]]
    with log.open("w") as stream:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=child_environment(), stdout=stream, stderr=subprocess.STDOUT
        )


def options(texts: Path, run_dir: Path, engine: str) -> list[str]:  # noqa: F811
    """A step takes 3 ms: nothing but steps for more than a second after the only save, where a rank can be stopped."""
    return overrides(
        texts, run_dir, f"engine={engine}", "engine.device=cuda", f"training.total_steps={STEPS}",
        f"checkpoint.interval_steps={SAVED}", f"training.validation_interval_steps={STEPS}",
        "logging.ssm_health_interval_steps=0",
        "watchdog.heartbeat_seconds=0.3", "watchdog.step_seconds=4", "alerts.timeout_seconds=5",
    )  # fmt: skip


def hang_of(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["kind"] == "hang"]


def last_operation(run_dir: Path, rank: int) -> dict[str, Any]:
    """The last collective operation of a rank that wrote its stacks and the record."""
    (record,) = (run_dir / "hangs").glob(f"step_*_rank_{rank:05d}.collectives.json")
    assert "in _watch" in (record.parent / f"{record.name.split('.')[0]}.txt").read_text()
    entries = json.loads(record.read_text())["entries"]
    print(f"{record.name}: {len(entries)} operations, the last one {json.dumps(entries[-1])[:700]}")
    last: dict[str, Any] = entries[-1]
    return last


@two_gpus
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_stopped_rank_is_named_with_the_record_of_nccl(texts: Path, tmp_path: Path, engine: str) -> None:  # noqa: F811
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = begin("train.py", log, *options(texts, run_dir, engine), restarts=1)
    wait_for(lambda: complete_steps(run_dir / "checkpoints") and len(metrics(run_dir)) > SAVED + 20, process, log)
    beats = read_heartbeats(run_dir)
    os.kill(beats[1]["pid"], signal.SIGSTOP)
    (hang,) = wait_for(lambda: hang_of(run_dir), process, log)
    assert hang["silent"] == [1]
    wait_for(lambda: not Path(f"/proc/{beats[0]['pid']}/cmdline").exists(), process, log)
    os.kill(beats[1]["pid"], signal.SIGKILL)  # torchrun would after half a minute
    last = last_operation(run_dir, 0)
    assert last["profiling_name"].startswith("nccl:")
    assert last["state"] != "completed"
    assert process.wait(120) == 0, log.read_text()[-3000:]
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert sorted(event["kind"] for event in read_events(run_dir)) == ["finished", "hang", "start", "start"]
    assert f"starts after step {SAVED} on 2 ranks" in log.read_text()


@two_gpus
def test_ranks_that_are_alive_all_write_their_stacks_and_records(texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """Rank 1 sleeps in its first step, rank 0 waits for it in a reduction."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [*options(texts, run_dir, "ddp"), "watchdog.first_step_seconds=25"]
    process = begin("tests/distributed/slow_rank.py", log, "step", "1", "200", *arguments)
    process.wait(150)
    (hang,) = hang_of(run_dir)
    assert (hang["silent"], hang["step"]) == ([], 1), log.read_text()[-3000:]
    assert "all ranks are alive and in it" in hang["text"]
    assert last_operation(run_dir, 0)["profiling_name"].startswith("nccl:")
    last_operation(run_dir, 1)
    assert "in slow" in (run_dir / "hangs" / "step_00000001_rank_00001.txt").read_text()
