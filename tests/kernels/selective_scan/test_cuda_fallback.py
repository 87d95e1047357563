"""Where the CUDA kernels can't run, one line of the log says why."""

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from kernels.selective_scan.cuda import device


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that can run them, nothing known yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(device, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(device, "kernel", lambda *arguments: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    device.device_unsupported.cache_clear()
    device._warn.cache_clear()
    yield
    device.device_unsupported.cache_clear()
    device._warn.cache_clear()


def no_nvrtc() -> str:
    raise RuntimeError("libnvrtc.so is missing")


def unknown_gpu(*arguments: object) -> None:
    raise RuntimeError("invalid value for --gpu-architecture")


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (torch.cuda, "is_available", lambda: False, "no NVIDIA GPU"),
        (torch.version, "cuda", None, "no NVIDIA GPU"),  # a build of torch for other GPUs
        (torch.cuda, "get_device_capability", lambda index: (7, 5), "compute capability (7, 5), 8.0 is needed"),
        (importlib.util, "find_spec", lambda name: None, "cuda-core is not installed (pip install cuda-core)"),
        (
            device,
            "compiler_version",
            no_nvrtc,
            'NVRTC can\'t be loaded (libnvrtc.so is missing); pip install "cuda-core[cu13]"',
        ),
        (device, "kernel", unknown_gpu, "can't be compiled or loaded for this GPU (invalid value"),
    ],
    ids=["no GPU", "not NVIDIA's", "old GPU", "no cuda-core", "no NVRTC", "new GPU"],
)
def test_the_log_says_once_why(
    owner: object,
    name: str,
    value: object,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(owner, name, value)
    with caplog.at_level(logging.WARNING):
        found = [device.unsupported(torch.zeros(1, 2, 3), 16) for _ in range(3)]
    assert found == [found[0]] * 3
    assert found[0] is not None
    assert reason in found[0]
    (record,) = caplog.records
    assert record.getMessage() == f"selective_scan runs in plain PyTorch, much slower: {found[0]}"


def test_nothing_is_logged_where_they_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert device.unsupported(torch.zeros(1, 2, 3), 16) is None
    assert not caplog.records


def test_what_is_computed_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        for dtype in (torch.float64, torch.float8_e4m3fn):
            reason = device.unsupported(torch.zeros(1, 2, 3, dtype=dtype), 16)
            assert reason == f"the CUDA kernels do not compute in {dtype}"
        assert device.unsupported(torch.zeros(1, 2, 3), 257) == "257 states are more than 256"
    assert len(caplog.records) == 3, "one line for each reason"
