"""What rank 0 finds out alone reaches the others, however much it is, and they wait for each other long enough."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mamba_train.ranks import (
    FIRST_PORT,
    N_PORTS,
    PART_CHARACTERS,
    WATCHED_TIMEOUT,
    Launch,
    OtherRankFailed,
    Ranks,
    _agree_on_start,
    _job,
    launch,
)
from tests.distributed.launch import child_environment, free_port
from tests.helpers import REPOSITORY


def test_a_value_may_be_larger_than_the_store_takes_at_once() -> None:
    """As the list of files of a corpus is that has tens of thousands of them."""
    timeout = timedelta(seconds=30)
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", served.port, timeout=timeout)
    value = {"files": [f"train/{number:07d}é" for number in range(600_000)]}
    assert sum(map(len, value["files"])) > 2 * PART_CHARACTERS
    asked: list[int] = []

    def list_files() -> dict[str, list[str]]:
        asked.append(1)
        return value

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda ranks: ranks.first(list_files), [Ranks(Launch(n, 2, n), s) for n, s in ((0, served), (1, other))]
        )
        assert list(found) == [value, value]
    assert asked == [1]


def test_whoever_sees_a_value_finds_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_train.ranks.PART_CHARACTERS", 5)
    seen: list[str] = []

    class Watched(dist.HashStore):
        """Is asked by another rank after each write."""

        def set(self, key: str, value: str) -> None:
            super().set(key, value)
            if self.check(["key"]):
                seen.append(Ranks(Launch(1, 2), self).await_post("key"))

    store = Watched()
    store.set_timeout(timedelta(seconds=1))
    Ranks(Launch(0, 2), store).post("key", "a value of several parts")
    assert seen == ["a value of several parts"]


@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit(2)])
def test_what_rank_0_fails_with_ends_the_others(error: BaseException) -> None:
    ranks = [Ranks(Launch(number, 2), store) for store in [dist.HashStore()] for number in (0, 1)]

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        ranks[0].first(fail)
    with pytest.raises(OtherRankFailed) as caught:
        ranks[1].first(fail)
    assert caught.value.kind == type(error).__name__
    assert [rank.failed for rank in ranks] == [True, True]


DECIDING = """
import json, sys, torch
from mamba_train import ranks
group = ranks.join()
def outcome(raises, error=ValueError):
    def work():
        if raises:
            raise error("mine")
        return group.rank
    try:
        return group.together(work)
    except ValueError as caught:
        return type(caught).__name__
value = torch.tensor([1.0, 10.0 * group.rank])
found = {
    "any": [group.any(False), group.any(group.rank == 0), group.any(group.rank == 1), group.any(True)],
    "sum": [group.sum(value).tolist(), value.tolist()],
    "failed before": group.failed,
    "together": [outcome(False), outcome(group.rank == 0), outcome(group.rank == 1), outcome(True), outcome(False)],
    "failed": group.failed,
}
ranks.before_leaving(lambda: print(json.dumps(found)))
ranks.leave(7)
"""


def test_ranks_decide_together() -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DECIDING],
            env=child_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port),
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for port in [str(free_port())]
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [7, 7], said
    for rank, found in enumerate(json.loads(out) for out, _ in said):
        assert found["any"] == [False, True, True, True]
        assert found["sum"] == [[2.0, 10.0], [1.0, 10.0 * rank]], "what was given stays as it is"
        own = ["ValueError", "OtherRankFailed"]
        assert found["together"] == [rank, own[rank], own[1 - rank], own[rank], rank], "the lowest rank says why"
        assert (found["failed before"], found["failed"]) == (False, True)


WATCHED = """
import json, torch, torch.distributed as dist
from mamba_train.ranks import Launch, Ranks, lone_group
lone_group()
groups = [dist.group.WORLD, dist.new_group([0])]
for watched in (False, True):
    if watched:
        Ranks(Launch(0, 2), dist.HashStore()).wait_as_watched()
    for group in groups:
        dist.all_reduce(torch.ones(1), group=group)
entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())["entries"]
print([entry["timeout_ms"] / 1000 for entry in entries])
dist.destroy_process_group()  # its threads may abort an interpreter that ends with them
"""


def test_collective_operations_wait_as_long_as_a_watchdog_lets_them() -> None:
    result = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [1800.0] * 2 + [WATCHED_TIMEOUT.total_seconds()] * 2


SetEnvironment = Callable[[dict[str, str]], None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    """Sets what a launcher would, where nothing else says who this process is."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def set_all(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_JOB_NODELIST": "gpu[001-008]",
}  # fmt: skip


def test_torchrun_inside_of_a_job_says_who_a_process_is(environment: SetEnvironment) -> None:
    environment({**STEP, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "9"})
    assert launch() == Launch(5, 8, 1, ("x", 9))


def test_a_step_of_one_task_has_nobody_to_meet(environment: SetEnvironment) -> None:
    environment({**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert launch() == Launch()


def test_a_job_meets_at_a_port_of_its_own_and_at_another_one_when_it_comes_back(
    environment: SetEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(STEP)

    def address(job: int, start: int) -> tuple[str, int] | None:
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        if start:  # SLURM sets it only then
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        else:
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        return launch().address

    found = [address(job, start) for job in range(123_456, 123_466) for start in range(20)]
    hosts, ports = zip(*filter(None, found), strict=True)
    assert set(hosts) == {"gpu007"}, "where the step begins, not the job"
    assert len(set(ports)) == 200
    assert FIRST_PORT <= min(ports) <= max(ports) < FIRST_PORT + N_PORTS <= 32768, "where Linux begins by itself"
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert address(123_456, 0) not in found, "another srun of the same allocation"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    assert launch().address == address(123_456, 0)
    assert _job() == "job_123456_0_1"
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert address(123_456, 3) == ("gpu007", 1234)


def test_torchruns_of_one_run_share_a_store_whatever_step_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_STEP_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert _job() == "job"


MEETING = """
import os, sys
from mamba_train import ranks
group = ranks.join()
said = group.first(lambda: sys.argv[1])
print(said, flush=True)
group.any(False)  # each has what it asks for
os._exit(0)  # as a start does that is ended: nothing is taken back
"""


def test_what_an_earlier_start_has_left_in_the_store_of_torchrun_is_not_taken_for_this_ones() -> None:
    """torchrun starts all anew with one count of restarts when a node comes, and with two when a rank of one fails."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for start, counts in enumerate([("0", "0"), ("0", "0"), ("0", "1")]):
        processes = []
        for rank in (1, 0):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
            torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": counts[rank]}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", MEETING, f"start {start}"], env=child_environment(**place, **torchrun),
                    cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        try:
            said = [process.communicate(timeout=60) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [out for out, _ in said] == [f"start {start}\n"] * 2, said


def test_a_rank_waits_for_the_answer_of_its_own_rank_0() -> None:
    store = dist.HashStore()

    def start(late_rank: int) -> list[str]:
        def agree(rank: int) -> str:
            time.sleep(0.2 * (rank == late_rank))
            return _agree_on_start(store, rank, 3)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(agree, range(3)))

    names = [start(late_rank) for late_rank in (0, 0, 1, 2)]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names), names
    assert len({of_ranks[0] for of_ranks in names}) == 4
