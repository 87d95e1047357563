"""The engines on two GPUs, over NCCL: the start of one GPU, a curve within bf16 noise, checkpoints of each other."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import common, runs, texts  # noqa: F401  fixtures
from tests.distributed.launch import TOPOLOGIES, drive, losses, metric, notes
from tests.distributed.test_parity import skip_without

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ON_GPUS = ("engine.device=cuda", "engine.precision=bf16")
NAMES = ["ddp x 2", "fsdp x 2", "zero-1 x 2", "zero-2 x 2", "zero-3 x 2"]


@pytest.fixture(scope="module")
def one(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    run_dir = tmp_path_factory.mktemp("gpu") / "one"
    result = drive(TOPOLOGIES["one"], texts, run_dir, *ON_GPUS)
    assert result.returncode == 0, result.stderr[-4000:]
    return run_dir


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


@pytest.mark.parametrize(
    ("name", "more"),
    [("fsdp x 2", ()), ("fsdp x 2", ("engine.reshard_after_forward=false",)), ("ddp x 2", ())],
    ids=["fsdp", "fsdp, kept", "ddp"],
)
def test_a_recorded_run_is_that_of_one_gpu(
    one: Path,
    texts: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    more: tuple[str, ...],
) -> None:
    """Graphs hold the collectives of four micro-batches; validations between them see the weights of now."""
    result = drive(TOPOLOGIES[name], texts, tmp_path / "run", *ON_GPUS, "engine.cuda_graphs=true", *more)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "cannot be recorded" not in result.stdout + result.stderr
    for key in ("loss", "validation/loss"):
        expected, found = metric(one, key), metric(tmp_path / "run", key)
        assert len(found) > 1
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 2e-2, key
