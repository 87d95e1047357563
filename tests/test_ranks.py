"""What rank 0 finds out alone reaches the others, however much it is, and they wait for each other long enough."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mamba_train.ranks import FIRST_PORT, N_PORTS, PART_CHARACTERS, WATCHED_TIMEOUT, Launch, Ranks, launch
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


def test_a_job_meets_at_a_port_of_its_own_and_at_another_one_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "gpu[007-008]"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)

    def address(job: int, start: int) -> tuple[str, int] | None:
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        if start:  # SLURM sets it only then
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        else:
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        return launch().address

    found = [address(job, start) for job in range(123_456, 123_466) for start in range(20)]
    hosts, ports = zip(*filter(None, found), strict=True)
    assert set(hosts) == {"gpu007"}
    assert len(set(ports)) == 200
    assert FIRST_PORT <= min(ports) <= max(ports) < FIRST_PORT + N_PORTS <= 32768, "where Linux begins by itself"
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert address(123_456, 3) == ("gpu007", 1234)
