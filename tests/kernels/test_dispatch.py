"""Where the Triton kernels can't run, the reference does, and one line of the log says why."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.library import custom_op

from kernels import dispatch
from kernels.causal_conv1d import launch as conv
from kernels.rms_norm import launch as norm
from kernels.ssd import launch as ssd


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that can run them, nothing known yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(dispatch, "_try", lambda index: None)
    dispatch._device_unsupported.cache_clear()
    dispatch.log_fallback.cache_clear()
    yield
    dispatch._device_unsupported.cache_clear()
    dispatch.log_fallback.cache_clear()


def no_compiler(index: int) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify one")


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (torch.cuda, "is_available", lambda: False, "no NVIDIA GPU"),
        (torch.version, "cuda", None, "no NVIDIA GPU"),  # a build of torch for other GPUs
        (torch.cuda, "get_device_capability", lambda index: (7, 5), "compute capability (7, 5), 8.0 is needed"),
        (importlib.util, "find_spec", lambda name: None, "Triton is not installed (pip install triton)"),
        (dispatch, "_try", no_compiler, "launch a kernel here (Failed to find C compiler. Please specify one)"),
    ],
    ids=["no GPU", "not NVIDIA's", "old GPU", "no Triton", "no compiler"],
)
def test_the_reason(owner: object, name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, value)
    found = dispatch.triton_unsupported(torch.zeros(2, 3))
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_what_is_computed_elsewhere() -> None:
    x, weight = torch.zeros(1, 2, 3), torch.zeros(3, 4)
    assert dispatch.triton_unsupported(x) is None
    assert conv.unsupported(x, weight) is None
    assert norm.unsupported(x, 3) is None
    assert dispatch.triton_unsupported(x.double()) == "the Triton kernels do not compute in torch.float64"
    assert "width 5" in str(conv.unsupported(x, torch.zeros(3, 5)))
    assert "16385 channels are more than 16384" in str(norm.unsupported(x, 16385))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "dt_min", "reason"),
    [
        (torch.bfloat16, 128, 0.0, None),
        (torch.float32, 128, 0.0, None),
        (torch.bfloat16, 129, 0.0, "heads of 129 channels are wider than 128"),
        (torch.bfloat16, 64, -1.0, "dt_limit lets Δ be negative"),
        (torch.float64, 64, 0.0, "do not compute in torch.float64"),
    ],
    ids=str,
)
def test_what_ssd_computes_elsewhere(dtype: torch.dtype, head_dim: int, dt_min: float, reason: str | None) -> None:
    found = ssd.unsupported(torch.zeros(1, 2, 1, head_dim, dtype=dtype), dt_min)
    assert found is None if reason is None else reason in str(found)


def test_one_line_of_the_log_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    @custom_op("mamba_train_test::twice", mutates_args=())
    def twice(x: torch.Tensor, why: str) -> torch.Tensor:
        return 2 * x

    dispatch.on_cuda(twice, lambda x, why: 2 * x + 100, lambda x, why: why or None)
    run = twice._backend_fns["cuda"]
    x = torch.ones(1)
    with caplog.at_level(logging.INFO):
        assert run(x, "") == 102
        assert not caplog.records
        for why in ("too odd", "too odd", "too even"):
            assert run(x, why) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"twice runs in plain PyTorch, slower: too {kind}" for kind in ("odd", "even")]


def test_operators_without_triton(repository: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels.causal_conv1d import causal_conv1d
from kernels.rms_norm import rms_norm
rms_norm(causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4)), torch.ones(3))
"""
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=120)
