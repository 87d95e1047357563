"""The look at a node: what it finds wrong, and that it names the node."""

import subprocess
import sys

import pytest
import torch

import kernels.selective_scan
from slurm.health import find_problem, main
from tests.helpers import REPOSITORY

GIB = 2**30


@pytest.fixture(autouse=True)
def no_command_of_this_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMBA_TRAIN_HEALTH_COMMAND", raising=False)


def test_a_node_without_gpus_that_is_well() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "slurm.health", "--gpus", "0"],
        cwd=REPOSITORY,
        env={"SLURMD_NODENAME": "node7", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "well node7\n"), result.stderr


def test_a_wrong_kernel_is_found_and_the_node_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = kernels.selective_scan.selective_scan
    # Wrong by 1% where it runs in fp32, as on a device whose arithmetic is off.
    monkeypatch.setattr(
        kernels.selective_scan,
        "selective_scan",
        lambda x, *others: scan(x, *others) * (1.01 if x.dtype == torch.float32 else 1.0),
    )
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(sys, "argv", ["health", "--gpus", "0"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    output = capsys.readouterr()
    assert output.out == "bad node7: the selective scan computes something else than its reference\n"
    assert "node node7 is not fit" in output.err


def test_a_wrong_gradient_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = kernels.selective_scan.selective_scan

    def wrong_backward(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        y = scan(x, *others)
        return y + 0.01 * (y - y.detach()) if x.dtype == torch.float32 else y

    monkeypatch.setattr(kernels.selective_scan, "selective_scan", wrong_backward)
    assert find_problem(0) == "the selective scan computes something else than its reference"


@pytest.mark.parametrize(
    ("n_gpus", "free_gib", "expected"),
    [
        (3, (79, 79, 79), "3 GPUs are visible, expected 4"),
        (4, (79, 79, 40, 79), "GPU 2 has 40 of 80 GiB free: another process is using it"),
        (4, (79, 79, 79, 79), None),
    ],
)
def test_gpus_and_their_memory(
    monkeypatch: pytest.MonkeyPatch, n_gpus: int, free_gib: tuple[int, ...], expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free_gib[index] * GIB, 80 * GIB))
    looked_at = []
    monkeypatch.setattr("slurm.health._kernel_problem", looked_at.append)
    assert find_problem(4) == expected
    assert expected or looked_at == [torch.device("cuda", index) for index in range(4)]


@pytest.mark.parametrize("kind", [RuntimeError, ImportError])  # a torch that cannot be loaded there, too
def test_what_the_check_stumbles_over_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fall_off_the_bus() -> int:
        raise kind("CUDA error:\nGPU lost")

    monkeypatch.setattr(torch.cuda, "device_count", fall_off_the_bus)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(sys, "argv", ["health", "--gpus", "1"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"bad node7: {kind.__name__}: CUDA error: GPU lost\n"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("true", None),
        ("echo the fan; echo is loud >&2; exit 3", "the fan is loud"),
        ("exit 3", "exit 3: exit code 3"),
    ],
)
def test_what_the_sites_own_check_says(monkeypatch: pytest.MonkeyPatch, command: str, problem: str | None) -> None:
    monkeypatch.setenv("MAMBA_TRAIN_HEALTH_COMMAND", command)
    monkeypatch.setattr("slurm.health._kernel_problem", lambda device: None)
    assert find_problem(0) == problem
