"""FLOP counts against PyTorch's own counter and published sizes; peaks against datasheets."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.ssd import reference
from mamba_train.composition import compose_config
from mamba_train.config import MixerKind, ModelConfig
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.monitor.flops import (
    FlopsPerToken,
    PeakFlops,
    datasheet_peak,
    flops_per_token,
    mfu,
    peak_flops,
)

LENGTH = 40


def config(**changes: Any) -> ModelConfig:
    """A small model whose sizes are all different."""
    sizes: dict[str, Any] = {"name": "test", "n_layer": 3, "d_model": 48, "d_state": 16, "vocab_size": 101}
    return resolve_model_config(ModelConfig(**{**sizes, **changes}), tokenizer_vocab_size=101)


MAMBA1 = config()
MAMBA2 = config(mixer=MixerKind.mamba2, head_dim=12, n_groups=2, chunk_size=16)
HYBRID = config(
    mixer=MixerKind.mamba2,
    head_dim=12,
    chunk_size=16,
    attention_layers=[1],
    attention_heads=6,
    attention_kv_heads=2,
    attention_head_dim=10,
    attention_d_conv=3,
    d_intermediate=56,
)
TRANSFORMER = config(mixer=MixerKind.attention, attention_heads=4, d_intermediate=56)
MODELS = {"mamba1": MAMBA1, "mamba2": MAMBA2, "hybrid": HYBRID, "transformer": TRANSFORMER}


def count_by_torch(function: Callable[[], object]) -> int:
    # PyTorch's counter does not know the CPU's fused attention, but sees the products of the plain one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_matrix_products_of_a_model_agree_with_pytorchs_counter(name: str) -> None:
    """The scans and convolutions are operators of our own, whose insides the counter does not see."""
    model = MambaLM(MODELS[name])
    initialise_(model, MODELS[name], seed=0)
    flops = flops_per_token(MODELS[name], LENGTH)
    counted = count_by_torch(lambda: model(torch.zeros(2, LENGTH, dtype=torch.int64)))
    hidden = flops.scan + flops.ssd + flops.conv
    assert (flops.forward - hidden) * 2 * LENGTH == counted


@pytest.mark.parametrize("length", [16, 40, 64])
def test_ssd_agrees_with_pytorchs_counter_inside_the_operator(length: int) -> None:
    heads, head_dim, groups, states = 8, 12, 2, 16
    x, dt = torch.zeros(1, length, heads, head_dim), torch.zeros(1, length, heads)
    B = torch.zeros(1, length, groups, states)
    arguments = (x, dt, -torch.ones(heads), B, B, None, None, None, True, 0.0, math.inf, 16, None, None, False, True)
    counted = count_by_torch(lambda: reference.ssd_op._init_fn(*arguments))
    assert flops_per_token(MAMBA2, length).ssd / MAMBA2.n_layer == pytest.approx(counted / length, rel=1e-3)


@pytest.mark.parametrize(("name", "channels", "width"), [("mamba1", 96, 4), ("mamba2", 96 + 2 * 2 * 16, 4)])
def test_convolution_agrees_with_pytorchs_counter(name: str, channels: int, width: int) -> None:
    convolution = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
    counted = count_by_torch(lambda: convolution(torch.zeros(1, channels, LENGTH + width - 1)))
    assert flops_per_token(MODELS[name], LENGTH).conv * LENGTH == 3 * counted


def test_scan_counts_seven_per_state() -> None:
    assert flops_per_token(MAMBA1, LENGTH).scan == 3 * 96 * 16 * 7


def test_layers_are_counted_by_their_kind() -> None:
    hybrid, pure = flops_per_token(HYBRID, LENGTH), flops_per_token(MAMBA2, LENGTH)
    assert hybrid.mlp == 3 * 6 * 48 * 56
    assert hybrid.attention == 4 * LENGTH * 6 * 10
    assert pure.attention == pure.mlp == pure.x_proj == 0
    assert flops_per_token(HYBRID, 2 * LENGTH).attention == 2 * hybrid.attention


def test_forward_and_training_totals() -> None:
    flops = FlopsPerToken(
        in_proj=1, conv=2, x_proj=3, dt_proj=4, scan=5, ssd=8, attention=9, out_proj=6, mlp=10, head=7
    )
    assert flops.forward == sum(flops.by_component.values()) == 55
    assert flops.training == 165
    assert (flops + flops).forward == 110


def test_mamba_130m_is_two_flops_per_weight_and_token_plus_the_scan() -> None:
    published = resolve_model_config(compose_config(["model=mamba_130m"]).model, tokenizer_vocab_size=50277)
    flops = flops_per_token(published, 2048)
    n_parameters = 129_135_360  # state-spaces/mamba-130m, tied embedding counted once
    # Weights that multiply nothing: the norms, the biases of conv and dt_proj, A_log, D.
    vectors = 25 * 768 + 24 * (1536 + 1536 + 1536 * 16 + 1536)
    assert flops.forward - flops.scan == 2 * (n_parameters - vectors)


def test_mfu_is_the_share_of_the_peak() -> None:
    flops = FlopsPerToken(head=100)
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
def testdatasheet_peaks(name: str, bf16: float | None, fp32: float | None) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float16, bf16), (torch.float32, fp32)):
        peak = datasheet_peak(name, dtype)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12))


def test_fp32_products_count_as_tf32_when_pytorch_may_use_it() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert datasheet_peak("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(156e12)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_is_measured_without_touching_the_random_state(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), dtype)
    assert peak.source == "measured"
    assert 1e8 < peak.flops_per_second < 1e15
    assert torch.equal(torch.get_rng_state(), before)
