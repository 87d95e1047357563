"""Asked to stop on a GPU, with data workers and pinned memory; and the look at a node that has one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba_train.checkpoint.storage import complete_steps
from mamba_train.training.preemption import EXIT_RESTART
from tests.helpers import REPOSITORY, curve, environment, metrics, train, train_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OVERRIDES = ("training.total_steps=300", "checkpoint.interval_steps=100000", "checkpoint.keep_best=false")


def start(run_dir: Path, corpus: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        train_command(run_dir, corpus, *OVERRIDES, *more),
        cwd=corpus.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_signal_to_all_processes_loses_nothing(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, corpus)
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESTART, stderr
    n_steps = len(metrics(run_dir))
    assert complete_steps(run_dir / "checkpoints")[0] - n_steps in (0, 1)  # one more when it was validating
    assert n_steps < 300
    for folder in (run_dir, tmp_path / "undisturbed"):
        assert train(folder, corpus, *OVERRIDES).returncode == 0
    assert curve(run_dir) == curve(tmp_path / "undisturbed")
    assert not list(run_dir.glob("metrics.cut-*"))


def test_a_signal_while_the_model_is_compiled(tmp_path: Path, corpus: Path) -> None:
    process = start(tmp_path / "run", corpus, "engine.compile=true")
    while not (tmp_path / "run" / "config.yaml").exists():  # what follows is the first step, which compiles
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESTART, stderr
    assert "SIGTERM: leaving before the first step" in stderr, "the compiler was waited for"


@pytest.mark.large_memory(8)  # so that it runs alone: a GPU that others use is not well
def test_a_node_with_a_gpu_that_is_well() -> None:
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "slurm.health", "--gpus"]
    well = subprocess.run([*command, "1"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (well.returncode, well.stdout[:5]) == (0, "well "), well.stdout + well.stderr
    n_gpus = torch.cuda.device_count()
    bad = subprocess.run([*command, str(n_gpus + 1)], cwd=REPOSITORY, capture_output=True, text=True)
    assert bad.returncode == 1
    assert f"{n_gpus} GPUs are visible, expected {n_gpus + 1}" in bad.stdout


def test_a_gpu_that_someone_else_uses_is_named() -> None:
    _, total = torch.cuda.mem_get_info()
    held = torch.empty(total // 5, dtype=torch.uint8, device="cuda")
    command = [sys.executable, "-m", "slurm.health", "--gpus", "1"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    del held
    torch.cuda.empty_cache()
    assert result.returncode == 1
    assert "GPU 0 has " in result.stdout
    assert "another process is using it" in result.stdout
