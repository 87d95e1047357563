"""A rank that is slow is named, with its host, wherever its time goes."""

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from mamba_train.config import WatchdogConfig
from mamba_train.monitor.event_log import EventLog, read_events
from mamba_train.training.stragglers import PARTS, Stragglers, _Forward
from tests.distributed.launch import child_environment, overrides, torchrun
from tests.helpers import REPOSITORY, metrics


class FourRanks:
    """Rank 0 of four; the hosts are there for the asking."""

    rank, world_size, device = 0, 4, torch.device("cpu")

    def __init__(self) -> None:
        self.model, self.ranks = nn.Identity(), self

    def new_key(self) -> str:
        return "hosts"

    def post(self, key: str, value: str) -> None:
        pass

    def await_post(self, key: str) -> str:
        return "node" + key.removeprefix("hosts/")


def test_the_rank_that_is_far_behind_the_median_is_named(tmp_path: Path) -> None:
    config = WatchdogConfig(straggler_interval_steps=2, straggler_ratio=1.5)
    stragglers = Stragglers(config, FourRanks(), EventLog(tmp_path))  # type: ignore[arg-type]
    assert stragglers.own(1) is None
    stragglers.add(30.0, 20.0)  # the first step of a start, in which there is something to compile
    for _ in range(2):
        stragglers.add(0.25, 0.125)
    own = stragglers.own(2)
    assert own is not None
    assert own.tolist() == [0.25, 0.0, 0.125, *[0.0] * 9]
    assert stragglers.own(2) is None, "nothing has been measured since"
    even = [[0.01, 0.10, 0.05], [0.01, 0.11, 0.04], [0.02, 0.10, 0.05], [0.01, 0.12, 0.03]]
    found = stragglers.compare(4, [value for row in even for value in row])
    assert found["ranks/slowest"] == 3
    assert found["ranks/slowest_ratio"] == pytest.approx(0.13 / 0.12)
    assert read_events(tmp_path) == []
    even[2] = [0.02, 0.40, 0.0]
    assert stragglers.compare(6, [value for row in even for value in row])["ranks/forward_seconds_max"] == 0.40
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["rank"], event["host"]) == ("straggler", 6, 2, "node2")
    assert "20 ms for its data and 400 ms" in event["text"]
    stragglers.compare(8, [value for row in even for value in row])
    assert len(read_events(tmp_path)) == 1, "a rank that stays slow is told of once"
    even[1] = [0.9, 0.40, 0.0]
    stragglers.compare(10, [value for row in even for value in row])
    assert [event["rank"] for event in read_events(tmp_path)] == [2, 1]
    assert len(PARTS) == 3


def test_passes_in_a_graph_have_no_time_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then microseconds of waiting for data make nobody slow, and long waiting does."""
    clock = _Forward(model := nn.Identity(), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model(torch.ones(1))  # an event that is recorded now could never be read
    clock.end()
    assert clock.seconds() == 0
    config = WatchdogConfig(straggler_interval_steps=2, straggler_ratio=1.5)
    stragglers = Stragglers(config, FourRanks(), EventLog(tmp_path))  # type: ignore[arg-type]
    rows = [[0.0001, 0.0, 0.2], [0.0001, 0.0, 0.2], [0.0009, 0.0, 0.2], [0.0001, 0.0, 0.2]]
    stragglers.compare(2, [value for row in rows for value in row])
    assert read_events(tmp_path) == []
    rows = [[0.0001, 0.0, 0.7], [0.0001, 0.0, 0.7], [0.5, 0.0, 0.2], [0.0001, 0.0, 0.7]]
    found = stragglers.compare(4, [value for row in rows for value in row])
    assert found["ranks/slowest_ratio"] == pytest.approx(0.7 / 0.2001)
    assert [event["rank"] for event in read_events(tmp_path)] == [2]


def test_one_process_is_not_compared(tmp_path: Path) -> None:
    engine = FourRanks()
    engine.world_size = 1
    stragglers = Stragglers(WatchdogConfig(straggler_interval_steps=1), engine, EventLog(tmp_path))  # type: ignore[arg-type]
    stragglers.add(1.0, 1.0)
    assert stragglers.own(1) is None
    assert stragglers.compare(1, []) == {}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "data"])
def test_a_slow_rank_among_three_is_found(where: str, tmp_path: Path, corpus: Path) -> None:
    more = ["engine=ddp", "training.global_batch_size=6", "watchdog.straggler_interval_steps=10"]
    script = [str(REPOSITORY / "tests/distributed/slow_rank.py"), where, "1", "0.2"]
    command = torchrun(3, *script, *overrides(corpus, tmp_path / "run", *more, "watchdog.straggler_ratio=2"))
    result = subprocess.run(
        command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [event for event in read_events(tmp_path / "run") if event["kind"] == "straggler"]
    assert [(event["step"], event["rank"], event["host"]) for event in found] == [(10, 1, platform.node())]
    key = "forward_seconds" if where == "forward" else "data_wait_seconds"
    assert all(event[key] > 0.2 for event in found)
    assert [record["step"] for record in metrics(tmp_path / "run") if "ranks/slowest" in record] == [10, 20, 30]
