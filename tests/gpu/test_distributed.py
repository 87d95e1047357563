"""The engines on two GPUs, over NCCL: the start of one GPU, a curve within bf16 noise, checkpoints of each other."""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import common, texts  # noqa: F401  fixtures
from tests.distributed.launch import TOPOLOGIES, SharedRuns, child_environment, drive, free_port, losses, notes
from tests.distributed.test_parity import skip_without
from tests.gpu import rank_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ON_GPUS = ("engine.device=cuda", "engine.precision=bf16")
NAMES = ["ddp x 2", "fsdp x 2", "zero-1 x 2", "zero-2 x 2", "zero-3 x 2"]


@pytest.fixture(scope="session")
def checked(common: Path, texts: Path) -> list[dict[str, str]]:  # noqa: F811
    """The error of each check, by rank; rank_checks.py runs once, also when tests are spread over processes."""
    folder = common / "rank_checks"
    with (common / "rank_checks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run_checks(folder, texts)
    found: list[dict[str, str]] = []
    for rank in range(2):
        file = folder / f"rank_{rank}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found.append({name: error for name, _, error in map(json.loads, lines)})
    return found


def run_checks(folder: Path, corpus: Path) -> None:
    """Two processes, started here: torchrun would import torch once more before they begin."""
    port = str(free_port())
    processes = []
    for rank in range(2):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        command = [sys.executable, "-m", "tests.gpu.rank_checks", str(folder), str(corpus)]
        with (folder / f"rank_{rank}.log").open("w") as log:
            environment = child_environment(**more, MASTER_PORT=port)
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        time.sleep(0.1)  # each check has its own limit
    for process in processes:
        try:
            process.wait(rank_checks.SECONDS)
        except subprocess.TimeoutExpired:  # the other one has failed where no check had begun
            process.kill()


@pytest.mark.parametrize("name", rank_checks.NAMES)
def test_two_ranks(checked: list[dict[str, str]], common: Path, name: str) -> None:  # noqa: F811
    """Recorded runs are the plain ones bit by bit, and more: see rank_checks.py."""
    for rank, errors in enumerate(checked):
        if name not in errors:
            said = [file.read_text()[-4000:] for file in sorted(common.glob(f"rank_checks/rank_{rank}.[ls]*"))]
            pytest.fail("\n".join([f"rank {rank} did not come to an end with it", *said]))
        assert not errors[name], f"rank {rank}: {errors[name]}"


@pytest.fixture(scope="session")
def one(common: Path, texts: Path) -> Path:  # noqa: F811
    folder = common / "gpu"
    folder.mkdir(exist_ok=True)
    return SharedRuns(folder, texts).get("one", *ON_GPUS)


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_trains_and_resumes_what_one_gpu_wrote(one: Path, texts: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    skip_without(name)
    result = drive(TOPOLOGIES[name], texts, tmp_path / "whole", *ON_GPUS)
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in notes(tmp_path / "whole"):
        assert rank["start"] == notes(one)[0]["start"]
    expected, found = losses(one), losses(tmp_path / "whole")
    assert found[-1] < found[0] - 1.0
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 2e-2

    shutil.copytree(one / "checkpoints" / "step_00000015", tmp_path / "half" / "checkpoints" / "step_00000015")
    result = drive(TOPOLOGIES[name], texts, tmp_path / "half", *ON_GPUS, options=["--no-pickle"])
    assert result.returncode == 0, result.stderr[-4000:]
    found = losses(tmp_path / "half")
    assert max(abs(a - b) for a, b in zip(expected[15:], found, strict=True)) < 2e-2
