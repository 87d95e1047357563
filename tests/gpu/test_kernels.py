"""The operators on a CUDA device against the same operators in fp64 on the CPU."""

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, gated_rms_norm
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from tests.kernels.loops import LENGTHS, gradients, random_documents, scan_inputs
from tests.kernels.ssd.loops import ssd_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs rounded to `dtype` on the device, and the same numbers in fp64 on the CPU."""
    low = {k: v if k == "seq_idx" else v.detach().to(dtype) for k, v in inputs.items()}
    device = {k: v.cuda().requires_grad_(k != "seq_idx") for k, v in low.items()}
    exact = {k: v if k == "seq_idx" else v.double().requires_grad_() for k, v in low.items()}
    return device, exact


def assert_near(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], device: dict, exact: dict, tol: float
) -> None:  # type: ignore[type-arg]
    found, wanted = gradients(actual, device), gradients(expected, exact)
    for name, a, e in [(f"output {i}", a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))] + [
        (name, found[name], wanted[name]) for name in found
    ]:
        assert a.is_cuda
        error = (a.detach().double().cpu() - e.detach()).abs().max() / e.detach().abs().max()
        assert error < tol, f"{name}: {error}"


DTYPES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("length", [*LENGTHS, 1000])
def test_selective_scan(length: int, dtype: torch.dtype, tolerance: float) -> None:
    device, exact = on_cuda(scan_inputs(2, length, 32, 16, packed=True), dtype)
    actual, expected = (selective_scan(**i, return_final_state=True) for i in (device, exact))
    assert_near(actual, expected, device, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("length", [*LENGTHS, 1000])
def test_ssd(length: int, dtype: torch.dtype, tolerance: float) -> None:
    device, exact = on_cuda(ssd_inputs(2, length, 8, 16, 2, 32, packed=True), dtype)
    actual, expected = (ssd(**i, chunk_size=64, return_final_state=True) for i in (device, exact))
    assert_near(actual, expected, device, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("before", [False, True])
def test_gated_rms_norm(before: bool, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 65, 64), "z": (2, 65, 64), "weight": (64,)}
    device, exact = on_cuda({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, dtype)
    actual, expected = (gated_rms_norm(**i, group_size=16, norm_before_gate=before) for i in (device, exact))
    assert_near((actual,), (expected,), device, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_conv1d(length: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, 32), "weight": (32, 4), "bias": (32,), "initial_state": (2, 3, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    device, exact = on_cuda(inputs | {"seq_idx": random_documents(2, length, generator)}, dtype)
    actual, expected = (causal_conv1d(**i, activation="silu", return_final_state=True) for i in (device, exact))
    assert_near(actual, expected, device, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_add_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 65, 64), "residual": (2, 65, 64), "weight": (64,)}
    device, exact = on_cuda({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, dtype)
    assert_near(add_rms_norm(**device), add_rms_norm(**exact), device, exact, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_linear_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, 65, 64), "weight": (257, 64)}
    device, exact = on_cuda({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, dtype)
    targets = torch.randint(0, 257, (2, 65), generator=generator)
    targets[0, :7] = -100
    actual = linear_cross_entropy(**device, targets=targets.cuda(), chunk_size=32)
    expected = linear_cross_entropy(**exact, targets=targets)
    assert_near((actual,), (expected,), device, exact, tolerance)
