"""The kernels of a decoded token compile for every architecture without a GPU, and spill no registers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux on x86-64)")

from kernels.decode import batch_kernels, batch_launch, launch
from kernels.decode import triton_kernels as kernels
from tests.kernels.ahead import CAPABILITIES, compile_kernel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def types(kernel: Any, state: str = "*fp32", **changed: Any) -> dict[str, Any]:
    """Those of mamba_1.4b and mamba2_1.3b in bf16."""
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    tensors = ("x", "z", "y", "weight", "norm_weight", "conv_state", "conv_input", "conv_weight", "conv_bias")
    arguments |= dict.fromkeys((*tensors, "mixed", "dt_weight", "dt", "projected", "sums"), "*bf16")
    arguments |= dict.fromkeys(("parts", "residual", "total", "dt_bias", "A_log", "D"), "*fp32")
    # As constants, else the compiler would not know what they are multiples of, as it does when they are launched.
    arguments |= {"batch": 64, "channels": 4096, "outputs": 160, "rank": 128, "splits": 64, "size": 10240}
    arguments |= {
        "ahead": "*bf16",
        "ahead_size": 2**23,
        "later_size": 2**23,
        "matrix_size": 2**23,
        "matrix_each": 512,
        "AHEAD": 256,
        "ONCE": False,
        "LINES": 128,
        "heads": 64,
        "head_dim": 64,
        "states": 16,
        "groups": 1,
        "conv_channels": 4352,
    }
    arguments |= dict.fromkeys(("x_batch", "z_batch", "dt_batch", "conv_input_batch", "row_stride"), 8192)
    arguments |= {"state": state, "eps": "fp32", "WIDTH": 4, "BATCH": 1, **changed}
    return {name: arguments[name] for name in kernel.arg_names}


SHAPE = batch_launch.LAUNCH
LINEAR = {
    "SIZE": 4096,
    "BATCH": 64,
    "INPUTS": SHAPE.inputs,
    "STAGES": SHAPE.stages,
    "THREADS": 32 * SHAPE.product_warps,
}
MANY: list[tuple[Any, dict[str, Any], int]] = [
    (
        batch_kernels.dt_scan_kernel,
        {"BATCH": SHAPE.batch, "CHANNELS": SHAPE.scan, "RANK": 128, "STATES": 16},
        SHAPE.scan_warps,
    ),
    (batch_kernels.norm_kernel, {"SPLITS": SHAPE.parts, "SIZE": 2048, "size": 2048}, SHAPE.norm_warps),
    (batch_kernels.gated_norm_kernel, {"SIZE": 4096, "size": 4096}, SHAPE.gated_norm_warps),
    (batch_kernels.sum_kernel, {"SPLITS": 32, "BLOCK": 128}, 4),
    (batch_kernels.linear_kernel, {**LINEAR, "OUTPUTS": SHAPE.tile, "SPLITS": SHAPE.parts}, SHAPE.product_warps),
    (batch_kernels.linear_kernel, {**LINEAR, "OUTPUTS": SHAPE.tile // 2, "SPLITS": 32}, SHAPE.product_warps),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_layer_for_one_sequence(capability: int, tmp_path: Path) -> None:
    pdl = {"PDL": capability >= 90}
    sizes = {"OUTPUTS": 256, "RANK": 128, "SPLITS": 64}
    linear = kernels.linear_kernel
    in_proj = {"SIZE": 2048, "PIECE": 2048, "GROUPS": 1, "ROWS": 4, "TILES": 4, "SHIFTED": 1, "outputs": 8192}
    out_proj = {
        "SIZE": 4096,
        "PIECE": 4096,
        "GROUPS": 1,
        "ROWS": 2,
        "TILES": 2,
        "SHIFTED": 16,
        "residual": None,
        "total": None,
        "outputs": 2048,
    }
    project = types(kernels.conv_project_kernel, "*bf16", CHANNELS=launch.LAUNCH.project, **sizes, **pdl)
    scan = types(kernels.dt_scan_kernel, CHANNELS=launch.LAUNCH.scan, STATES=16, **sizes, **pdl)
    for kernel, arguments in (
        (linear, types(linear, **in_proj, **pdl, z=None, conv_state=None, conv_input=None)),
        (linear, types(linear, **out_proj, **pdl)),
        (kernels.conv_project_kernel, project),
        (kernels.dt_scan_kernel, scan),
        (
            kernels.conv_ssd_kernel,
            types(kernels.conv_ssd_kernel, states=128, ROWS=launch.LAUNCH.ssd, STATES=128, **pdl),
        ),
        (kernels.greedy_kernel, types(kernels.greedy_kernel, logits="*bf16", token="*i64", REFUSED=-1, BLOCK=8192)),
    ):
        warps = 16 if kernel is kernels.greedy_kernel else launch.LAUNCH.warps
        found = compile_kernel(kernel, arguments, capability, warps, tmp_path)
        print(kernel.__name__, f"sm_{capability}", found)
        assert found.stack == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("state", ["*fp16", "*bf16", "*fp32"])
def test_a_layer_for_many_sequences(capability: int, state: str, tmp_path: Path) -> None:
    for kernel, sizes, warps in MANY:
        arguments = types(kernel, state, **sizes, PDL=capability >= 90)
        found = compile_kernel(kernel, arguments, capability, warps, tmp_path)
        print(kernel.__name__, f"sm_{capability}", found)
        assert found.stack == 0
