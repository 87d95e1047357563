from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mamba_train.checkpoint import Checkpoint


def _make(step: int, *, seed: int = 0, width: int = 32) -> Checkpoint:
    draw = torch.Generator().manual_seed(1000 * step + seed)
    weight = torch.randn(width, width, generator=draw)
    return Checkpoint(
        step=step,
        model={
            "embedding.weight": weight,
            "blocks.0.in_proj.weight": torch.randn(width, 3, generator=draw).bfloat16(),
            "blocks.0.A_log": torch.nn.Parameter(torch.randn(width, 4, generator=draw)),
            "blocks.0.D": torch.tensor([float("nan"), float("inf"), -0.0]),
            "blocks.0.empty": torch.zeros(0, 3),
        },
        optimizer={
            "embedding.weight.exp_avg": weight * 0.1,
            "embedding.weight.exp_avg_sq": weight.double() ** 2,
            "embedding.weight.step": torch.tensor(float(step)),
            "count": torch.arange(5, dtype=torch.int64),
            "mask": torch.tensor([True, False]),
        },
        rng={"torch_cpu": torch.randint(0, 256, (5056,), dtype=torch.uint8, generator=draw)},
        state={"step": step, "tokens": 2**40 + step, "ledger": [{"step": 3, "grad_norm": 1e30}], "wandb": None},
        config={"model": {"d_model": width, "dt_rank": None}, "optim": {"lr": 1e-05}, "seed": 0},
        fingerprints={"data": f"sha256:{step}", "code": "0123", "config": "abcd"},
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    for group, tensors in expected.tensor_groups().items():
        others = found.tensor_groups()[group]
        assert others.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert others[name].dtype == tensor.dtype, name
            assert others[name].shape == tensor.shape, name
            assert _bytes(others[name]) == _bytes(tensor), name
    for name in ("step", "state", "config", "fingerprints"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.fixture
def make_checkpoint() -> Callable[..., Checkpoint]:
    """A checkpoint with tensors of many kinds that depend on step and seed."""
    return _make


@pytest.fixture
def assert_same() -> Callable[[Checkpoint, Checkpoint], None]:
    """Compares two checkpoints, tensors bit by bit."""
    return _assert_same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's checkpoints folder that does not exist yet."""
    return tmp_path / "run" / "checkpoints"
