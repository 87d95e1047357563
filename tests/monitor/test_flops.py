"""FLOP counts against PyTorch's own counter and published sizes; peaks against datasheets."""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mamba_train.monitor.flops import (
    FlopsPerToken,
    PeakFlops,
    _datasheet_peak,
    mamba1_flops_per_token,
    mfu,
    peak_flops,
)

SIZES = {
    "n_layer": 3,
    "d_model": 48,
    "d_inner": 96,
    "d_state": 16,
    "d_conv": 4,
    "dt_rank": 3,
    "vocab_rows": 104,
}


def count_by_torch(module: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(*shape))
    return counter.get_total_flops()


def test_matrix_products_agree_with_pytorchs_counter() -> None:
    flops = mamba1_flops_per_token(**SIZES)
    length, layers = 10, SIZES["n_layer"]
    products = {
        "in_proj": nn.Linear(48, 2 * 96, bias=False),
        "x_proj": nn.Linear(96, 3 + 2 * 16, bias=False),
        "dt_proj": nn.Linear(3, 96, bias=False),
        "out_proj": nn.Linear(96, 48, bias=False),
    }
    for name, module in products.items():
        assert asdict(flops)[name] * length == layers * count_by_torch(module, 1, length, module.in_features)
    assert flops.head * length == count_by_torch(nn.Linear(48, 104, bias=False), 1, length, 48)
    convolution = nn.Conv1d(96, 96, 4, groups=96, bias=False)
    assert flops.conv * length == layers * count_by_torch(convolution, 1, 96, length + 3)


def test_scan_counts_seven_per_state() -> None:
    assert mamba1_flops_per_token(**SIZES).scan == 3 * 96 * 16 * 7


def test_forward_and_training_totals() -> None:
    flops = FlopsPerToken(in_proj=1, conv=2, x_proj=3, dt_proj=4, scan=5, out_proj=6, head=7)
    assert flops.forward == 28
    assert flops.training == 84


def test_mamba_130m_is_two_flops_per_weight_and_token_plus_the_scan() -> None:
    flops = mamba1_flops_per_token(
        n_layer=24, d_model=768, d_inner=1536, d_state=16, d_conv=4, dt_rank=48, vocab_rows=50280
    )
    n_parameters = 129_135_360  # state-spaces/mamba-130m, tied embedding counted once
    # Weights that multiply nothing: the norms, the biases of conv and dt_proj, A_log, D.
    vectors = 25 * 768 + 24 * (1536 + 1536 + 1536 * 16 + 1536)
    assert flops.forward - flops.scan == 2 * (n_parameters - vectors)


def test_mfu_is_the_share_of_the_peak() -> None:
    flops = FlopsPerToken(100, 0, 0, 0, 0, 0, 0)
    assert mfu(10.0, flops, PeakFlops(6000.0, "datasheet")) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA A10G", 70.0, 31.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA L40", 181.0, 90.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("Tesla P100", None, None),
        ("NVIDIA RTX A4000", None, None),  # not an A40
    ],
)
def test_datasheet_peaks(name: str, bf16: float | None, fp32: float | None) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float16, bf16), (torch.float32, fp32)):
        peak = _datasheet_peak(name, dtype)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12))


def test_fp32_products_count_as_tf32_when_pytorch_may_use_it() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert _datasheet_peak("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(156e12)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_is_measured_without_touching_the_random_state(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), dtype)
    assert peak.source == "measured"
    assert 1e8 < peak.flops_per_second < 1e15
    assert torch.equal(torch.get_rng_state(), before)
