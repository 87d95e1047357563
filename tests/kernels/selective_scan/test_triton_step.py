"""The GPU's decode step as far as it can be tested without one."""

from pathlib import Path

import pytest
import torch

from kernels.selective_scan import step, step_launch
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_step.py"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("states", [16, 256])
def test_compiles_within_its_registers(capability: int, states: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.selective_scan.step_kernel import step_kernel

    half, single = ("x", "dt", "B", "C", "z", "y"), ("state", "A", "D", "dt_bias", "new_state")
    channels = step_launch.LAUNCH.elements // states or 1
    constants = {"SOFTPLUS": True, "A_IS_LOG": True, "CHANNELS": channels, "STATES": states}
    constants["PDL"] = capability >= 90
    pointers = dict.fromkeys(half, "*bf16") | dict.fromkeys(single, "*fp32")
    arguments = {name: (pointers | constants).get(name, "i32") for name in step_kernel.arg_names}
    used = compile_kernel(step_kernel, arguments, capability, step_launch.LAUNCH.warps, tmp_path)
    assert used.stack <= 8
    assert used.registers <= 128


def test_opcheck() -> None:
    """The operator as CUDA devices see it, with the plain step in place of the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, dt, z = (torch.randn(2, 6, generator=generator).bfloat16() for _ in range(3))
    B, C = (torch.randn(2, 4, generator=generator).bfloat16() for _ in range(2))
    state, A = torch.randn(2, 6, 4, generator=generator), -torch.rand(6, 4, generator=generator)
    vector = torch.randn(6, generator=generator)
    for arguments in (
        (state, x, dt, A, B, C, vector, z, vector, True, False),
        (state, x, dt, A, B, C, None, None, None, False, True),
    ):
        for operator in (step._op, step._op_):
            torch.library.opcheck(operator._opoverload, arguments, test_utils=("test_schema", "test_faketensor"))
