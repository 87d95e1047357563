"""The GPU's decode step of Mamba-2 as far as it can be tested without one."""

import math
from pathlib import Path

import pytest
import torch

from kernels.ssd import step, step_launch
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_step.py"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("states", [64, 128])
def test_compiles_within_its_registers(capability: int, states: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.ssd.step_kernel import step_kernel

    half, single = ("x", "dt", "B", "C", "z", "y"), ("state", "A", "D", "dt_bias", "new_state")
    constants = {"SOFTPLUS": True, "A_IS_LOG": True, "STATES": states}
    constants["PDL"] = capability >= 90
    values = dict.fromkeys(half, "*bf16") | dict.fromkeys(single, "*fp32") | dict.fromkeys(("dt_min", "dt_max"), "fp32")
    strides_of_one = dict.fromkeys(("state_column", "x_row", "B_state", "C_state", "z_row"), 1)
    arguments = {name: (values | constants | strides_of_one).get(name, "i32") for name in step_kernel.arg_names}
    # What the compiler knows of the rows of a model's state: that they begin at multiples of 16 elements.
    rows = {"state_batch": 4096 * states, "state_head": 64 * states, "state_row": states, "states": states}
    for strides, launch in (({}, step_launch.launch_for(1)), (rows, step_launch.launch_for(*rows.values()))):
        sizes = {"ROWS": launch.elements // states, **strides}
        used = compile_kernel(step_kernel, arguments | sizes, capability, launch.warps, tmp_path)
        assert used.stack <= 8
        assert used.registers <= 128


def test_opcheck() -> None:
    """The operators as CUDA devices see them, with the plain step in place of the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 4, 5, generator=generator).bfloat16() for _ in range(2))
    B, C = (torch.randn(2, 2, 3, generator=generator).bfloat16() for _ in range(2))
    state, dt = torch.randn(2, 4, 5, 3, generator=generator), torch.randn(2, 4, generator=generator).bfloat16()
    vector = torch.rand(4, generator=generator)
    for arguments in (
        (state, x, dt, -vector, B, C, vector, z, vector, True, 0.0, math.inf, False),
        (state, x, dt, vector, B, C, None, None, None, False, 0.1, 1.0, True),
    ):
        for operator in (step._op, step._op_):
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
