"""SSD's Triton kernels compile for every architecture without a GPU, and spill few registers."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (Linux on x86-64)")

from kernels.ssd import launch
from kernels.ssd.backward_kernels import gradients_kernel
from kernels.ssd.flow_kernels import flows_kernel
from kernels.ssd.forward_kernels import forward_kernel, states_kernel
from tests.kernels.ahead import CAPABILITIES, Resources, assembler_report, compile_kernel, compiled_for

SPILLED_BYTES = {"forward_kernel": 600, "states_kernel": 100, "gradients_kernel": 480, "flows_kernel": 480}
SHARED_OF_AN_H100, SYSTEM_SHARED = 233_472, 1024  # bytes, of a multiprocessor and what each program costs besides
FP32 = (
    "decays",
    "before",
    "starts",
    "final_state",
    "first",
    "last_grad",
    "ends",
    "sums",
    "through",
    "own_products",
    "owns",
    "D_parts",
    "scratch",
    "D",
    "powers",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def resources(
    kernel: Any, shape: launch.Shape, folder: Path, capability: int = 90, everything: bool = False, **constants: Any
) -> Resources:
    """everything: with a gate, states given and wanted, D for each channel."""
    arguments = arguments_of(kernel, shape, everything, **constants)
    return compile_kernel(kernel, arguments, capability, shape.warps, folder)


def arguments_of(kernel: Any, shape: launch.Shape, everything: bool = False, **constants: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(FP32, "*fp32")
    activations = ("x", "B", "C", "y", "y_grad", "end_grads", "carried", "x_grad", "B_grad", "C_grad")
    arguments |= dict.fromkeys(activations, "*bf16")
    arguments |= dict.fromkeys(("z", "ungated"), "*bf16" if everything else None)
    if not everything:
        arguments |= dict.fromkeys(("starts", "before", "first", "last_grad", "D_parts", "powers"))
    if kernel is not forward_kernel:
        arguments["starts"] = "*bf16"
    arguments |= {"WIDE_SKIP": everything, "BACK": False, "WHOLE": not everything, "EXACT": False, "ALIGN": 8}
    arguments |= {"CHUNK": launch.GRADIENTS.chunk, "HALVES": launch.FLOWS.chunk // launch.GRADIENTS.chunk}
    arguments |= {"Q": shape.chunk, "P": min(shape.head_dim, 64), "N": min(shape.states, 128), "STAGES": shape.stages}
    arguments |= constants
    return {name: arguments[name] for name in kernel.arg_names}


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
def test_table(capability: int, tmp_path: Path) -> None:
    for kernel, shape, constants in (
        (forward_kernel, launch.FORWARD, {}),
        (states_kernel, launch.STATES, {"BOTH": True}),
        (states_kernel, launch.STATES, {"BOTH": True, "BACK": True}),
        (states_kernel, launch.STATES, {"BOTH": False, "y_grad": None, "C": None, "starts": None, "powers": "*fp32"}),
        (gradients_kernel, launch.GRADIENTS, {}),
        (flows_kernel, launch.FLOWS, {}),
    ):
        found = resources(kernel, shape, tmp_path, capability, **constants)
        print(kernel.__name__, f"sm_{capability}", found)
        assert found.stack <= SPILLED_BYTES[kernel.__name__]
        assert found.widest_store >= (4 if kernel is flows_kernel else 8)  # sums of rows
        if capability == 90 and kernel in (forward_kernel, flows_kernel):
            assert 2 * (found.shared + SYSTEM_SHARED) <= SHARED_OF_AN_H100  # two programs, which hide waits


def test_the_steps_of_a_product_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """As all of a kernel's do where ptxas finds registers that change while a product may still read them."""
    for kernel, shape in (
        *((forward_kernel, launch.FORWARD), (states_kernel, launch.STATES)),
        *((gradients_kernel, launch.GRADIENTS), (flows_kernel, launch.FLOWS)),
    ):
        compiled = compiled_for(kernel, arguments_of(kernel, shape, BOTH=True), 90, shape.warps)
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        said = assembler_report(compiled, "sm_90a", tmp_path)
        assert "registers" in said
        assert "serialized" not in said, said


@pytest.mark.slow
def test_every_option(tmp_path: Path) -> None:
    resources(forward_kernel, launch.FORWARD, tmp_path, everything=True)
    resources(states_kernel, launch.STATES, tmp_path, everything=True, BOTH=True)
    resources(gradients_kernel, launch.GRADIENTS, tmp_path, everything=True)
    resources(flows_kernel, launch.FLOWS, tmp_path, everything=True)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("large", "capability", "limit"), [(True, 90, 232_448), (True, 80, 166_912), (False, 120, 101_376)]
)
def test_tiles_fit_into_shared_memory(
    large: bool, capability: int, limit: int, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all options, and states in blocks."""
    monkeypatch.setattr(launch, "has_large_shared_memory", lambda index: large)
    x, B = (torch.empty(1, 1, 1, size, dtype=torch.bfloat16) for size in (head_dim, 256))
    shapes = launch.shapes(x, B)
    constants = {"P": head_dim, "N": shapes.gradients.states}
    assert resources(gradients_kernel, shapes.gradients, tmp_path, capability, True, **constants).shared <= limit
    assert resources(flows_kernel, shapes.flows, tmp_path, capability, True, **constants).shared <= limit
    assert resources(forward_kernel, shapes.forward, tmp_path, capability, True).shared <= limit
    assert resources(states_kernel, shapes.states, tmp_path, capability, True, BOTH=True).shared <= limit
