"""The decoded token of Mamba-1 as far as it can be tested without a GPU."""

from pathlib import Path

import pytest
import torch

from kernels.mamba_step import _op, launch, mamba_step_
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.mamba_step.inputs import draw
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_within_its_registers(capability: int, tmp_path: Path) -> None:
    """With the sizes of mamba_1.4b."""
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.mamba_step.triton_kernels import project_kernel, scan_kernel

    half = ("x", "z", "mixed", "weight", "dt_weight", "y", "conv_weight", "conv_bias")
    single = ("parts", "dt_bias", "A_log", "D")
    types = dict.fromkeys(half, "*bf16") | dict.fromkeys(single, "*fp32")
    strides = {"x_channel": 1, "z_channel": 1}
    for kernel, state, constants, shape in (
        (project_kernel, "*bf16", {"WIDTH": 4, "CHANNELS": launch.PROJECT.channels, "OUTPUTS": 256}, launch.PROJECT),
        (scan_kernel, "*fp32", {"CHANNELS": 32, "RANK": 128, "STATES": 16, "SPLITS": 64}, launch.SCAN),
    ):
        values = types | strides | constants | {"state": state}
        arguments = {name: values.get(name, "i32") for name in kernel.arg_names}
        assert compile_kernel(kernel, arguments, capability, shape.warps, tmp_path).stack <= 8


def test_opcheck() -> None:
    """The operator as CUDA devices see it, with the plain step in place of the kernels."""
    inputs = tuple(draw(2, 20, 3, 4, 4, torch.float32).values())
    torch.library.opcheck(_op, inputs, test_utils=("test_schema", "test_faketensor"))


def test_which_sizes_the_kernels_are_for() -> None:
    def fits(batch: int = 1, states: int = 16, width: int = 4) -> bool:
        inputs = draw(batch, 4, 2, states, width, torch.float32)
        return launch.fits(inputs["x"], inputs["A_log"], inputs["conv_weight"], inputs["dt_proj_weight"])

    assert fits()
    assert fits(batch=launch.MAX_BATCH)
    assert not fits(batch=launch.MAX_BATCH + 1)
    assert not fits(states=256)
    assert not fits(width=17)


@pytest.mark.parametrize("name", list(draw(1, 2, 1, 1, 2, torch.float32)))
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = draw(2, 20, 3, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="mamba_step_: "):
        mamba_step_(**(inputs | {name: torch.cat([inputs[name], inputs[name]])}))


def test_states_that_cannot_be_overwritten() -> None:
    inputs = draw(2, 20, 3, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        mamba_step_(**(inputs | {"scan_state": inputs["scan_state"].transpose(1, 2).contiguous().transpose(1, 2)}))
    with pytest.raises(ValueError, match="no_grad"):
        mamba_step_(**(inputs | {"D": inputs["D"].requires_grad_()}))
