"""The Triton kernels compile for every architecture without a GPU, with wide accesses and few spilled registers."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux on x86-64)")

from kernels.causal_conv1d import launch as conv
from kernels.causal_conv1d.triton_backward import backward_kernel
from kernels.causal_conv1d.triton_kernels import forward_kernel
from kernels.rms_norm import shapes as norm
from kernels.rms_norm import triton_kernels as norm_kernels
from tests.kernels.ahead import CAPABILITIES, Resources, compile_kernel, compiled_for

SPILLED_BYTES = 160  # the gated backward of 5,120 channels
SIZES = [768, 2560, 4088, 5120]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # that a program may have
CONVOLUTIONS = (  # the last ones with a second summand of the gradient
    (forward_kernel, conv.FORWARD, False),
    (backward_kernel, conv.BACKWARD_ONCE, False),
    (backward_kernel, conv.backward_shape(8, 2048, 5120, 132, with_more=False), False),
    (backward_kernel, conv.backward_shape(8, 2048, 5120, 132, with_more=True), True),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def conv_arguments(
    kernel: Any,
    shape: conv.Shape,
    with_more: bool,
    capability: int = 90,
    dtype: str = "*bf16",
    width: int = 4,
    everything: bool = False,
    align: int = 8,
) -> dict[str, Any]:
    """everything: with document boundaries, initial state, and the final state's gradient."""
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("x", "y", "final_state", "y_grad", "x_grad"), dtype)
    arguments |= {"weight": "*fp32", "bias": "*fp32", "parts": "*fp32", "seq_idx": "*i32" if everything else None}
    arguments |= dict.fromkeys(("initial_state", "final_grad", "state_grad"), dtype if everything else None)
    arguments["more"] = dtype if with_more else None
    arguments |= {"WIDTH": width, "SILU": True, "ALIGN": align, "PDL": capability >= 90}
    steps = {"STEPS": shape.steps} if kernel is forward_kernel else {"UNROLL": shape.unroll}
    return arguments | steps | {"BLOCK": shape.block, "STRETCHES": shape.stretches}


def conv_resources(
    kernel: Any, shape: conv.Shape, with_more: bool, folder: Path, capability: int = 90, **options: Any
) -> Resources:
    arguments = conv_arguments(kernel, shape, with_more, capability, **options)
    return compile_kernel(kernel, arguments, capability, shape.warps, folder)


def norm_arguments(
    kernel: Any,
    size: int,
    gated: bool,
    capability: int = 90,
    before: bool = False,
    align: int = 4,
    activations: str = "*bf16",
    groups: int | str = 1,
) -> tuple[dict[str, Any], int]:
    """And the number of warps."""
    is_forward = kernel is norm_kernels.forward_kernel
    value_bytes = 4 if activations == "*fp32" else 2
    row_bytes = 3 * value_bytes if gated else value_bytes + 8
    shared = SHARED_BYTES[capability] - 8192
    loop = norm.backward_shape(size, gated, row_bytes, shared)
    shape = norm.forward_shape(size, gated) if is_forward else loop
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("x", "y", "y_grad", "x_grad"), activations)
    arguments |= dict.fromkeys(("weight", "inverse_rms", "parts"), "*fp32")
    arguments |= dict.fromkeys(("z", "z_grad"), activations if gated else None)
    arguments |= dict.fromkeys(("residual", "total", "through", "total_grad"), None if gated else "*fp32")
    if not (gated or is_forward):
        arguments["x"] = "*fp32"
    constants = {"NORM_FIRST": before, "ALIGN": align, "ROWS": shape.rows}
    constants |= {"PDL": capability >= 90, "groups": groups} if is_forward else {"STAGES": loop.stages}
    constants |= {"PIECES": -(-size // shape.block), "BLOCK": shape.block}
    return arguments | {"eps": "fp32"} | constants, shape.warps


def norm_resources(
    kernel: Any, size: int, gated: bool, folder: Path, capability: int = 90, **options: Any
) -> Resources:
    arguments, warps = norm_arguments(kernel, size, gated, capability, **options)
    return compile_kernel(kernel, arguments, capability, warps, folder)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_convolution(capability: int, tmp_path: Path) -> None:
    for kernel, shape, with_more in CONVOLUTIONS:
        found = conv_resources(kernel, shape, with_more, tmp_path, capability)
        print(kernel.__name__, f"sm_{capability}", found)
        assert found.stack == 0
        channels_of_a_lane = shape.block // shape.warps // 32
        assert found.widest_store >= 2 * channels_of_a_lane, "a lane stores its channels one by one"


@pytest.mark.parametrize(("dtype", "width", "align"), [("*bf16", 4, 8), ("*fp16", 3, 4), ("*fp32", 2, 1)])
def test_options_of_the_convolution(dtype: str, width: int, align: int, tmp_path: Path) -> None:
    for kernel, shape, with_more in CONVOLUTIONS:
        found = conv_resources(
            kernel, shape, with_more, tmp_path, dtype=dtype, width=width, everything=True, align=align
        )
        assert found.stack <= SPILLED_BYTES


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("gated", [False, True])
def test_norms(gated: bool, capability: int, tmp_path: Path) -> None:
    for size in SIZES:
        for kernel in (norm_kernels.forward_kernel, norm_kernels.backward_kernel):
            found = norm_resources(kernel, size, gated, tmp_path, capability)
            print(kernel.__name__, size, f"sm_{capability}", found)
            assert found.stack <= SPILLED_BYTES
            assert found.widest_store >= 8


@pytest.mark.parametrize("size", [64, 256, 608, 928])
@pytest.mark.parametrize("gated", [False, True])
def test_norms_of_several_rows_pass_only_sums_between_threads(gated: bool, size: int, tmp_path: Path) -> None:
    """A weight in other threads than the rows would go through shared memory, as many bytes as a piece has."""
    kernel = norm_kernels.forward_kernel
    arguments, warps = norm_arguments(kernel, size, gated, align=8 if gated else 4)
    assert arguments["ROWS"] > 1
    found = compile_kernel(kernel, arguments, 90, warps, tmp_path)
    assert found.shared <= 4 * warps * arguments["ROWS"]


@pytest.mark.parametrize("size", [304, 10240])
def test_norms_wait_then_read_all_then_write(size: int) -> None:
    """A load behind a store waits for it, and for what that store waits for."""
    kernel = norm_kernels.forward_kernel
    arguments, warps = norm_arguments(kernel, size, gated=False)
    ptx = compiled_for(kernel, arguments, 90, warps).asm["ptx"]
    accesses = accesses_after_the_wait(ptx)
    assert arguments["PIECES"] > 1
    assert accesses == sorted(accesses)
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("bulk.prefetch") == 2  # x and the residual
    assert "prefetch" not in after


def test_the_convolution_waits_first_and_lets_the_next_kernel_start_last() -> None:
    """Programs of a kernel that starts sooner gather on the multiprocessors that are free first."""
    for kernel, shape, with_more in CONVOLUTIONS:
        arguments = conv_arguments(kernel, shape, with_more)
        ptx = compiled_for(kernel, arguments, 90, shape.warps).asm["ptx"]
        wait, *accesses, launch = re.findall(r"griddepcontrol\.\w+|(?:ld|st)\.global", ptx)
        assert (wait, launch) == ("griddepcontrol.wait", "griddepcontrol.launch_dependents")
        assert set(accesses) == {"ld.global", "st.global"}


def accesses_after_the_wait(ptx: str) -> list[str]:
    """Loads and stores in their order; none is before the wait for the kernel before, whose results it may read."""
    wait, launch, *accesses = re.findall(r"griddepcontrol\.\w+|(?:ld|st)\.global", ptx)
    assert (wait, launch) == ("griddepcontrol.wait", "griddepcontrol.launch_dependents")
    return accesses


@pytest.mark.parametrize("size", [1, norm.MAX_SIZE])
def test_sizes_of_norms(size: int, tmp_path: Path) -> None:
    for kernel in (norm_kernels.forward_kernel, norm_kernels.backward_kernel):
        norm_resources(kernel, size, True, tmp_path, before=True, align=1, groups="i32")
        norm_resources(kernel, size, False, tmp_path, align=1)


@pytest.mark.parametrize("capability", [90, 120])
@pytest.mark.parametrize("activations", ["*bf16", "*fp32"])
def test_rows_that_wait_fit_in_shared_memory(activations: str, capability: int, tmp_path: Path) -> None:
    for size in (5120, norm.MAX_SIZE):
        for gated in (False, True):
            kernel = norm_kernels.backward_kernel
            found = norm_resources(kernel, size, gated, tmp_path, capability, activations=activations)
            assert found.shared <= SHARED_BYTES[capability], (size, gated)
