"""The GPU's decode step as far as it can be tested without one."""

from pathlib import Path

import pytest
import torch

from kernels.ssd import step, step_launch
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_step.py"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_within_its_registers(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.ssd.step_kernel import step_kernel

    half, single = ("x", "dt", "B", "C", "z", "y"), ("state", "A", "D", "dt_bias", "new_state")
    constants = {"SOFTPLUS": True, "WIDE_SKIP": False, "CHANNELS": step_launch.LAUNCH.elements // 128, "STATES": 128}
    types = dict.fromkeys(half, "*bf16") | dict.fromkeys(single, "*fp32") | dict.fromkeys(("dt_min", "dt_max"), "fp32")
    arguments = {name: (types | constants).get(name, "i32") for name in step_kernel.arg_names}
    used = compile_kernel(step_kernel, arguments, capability, step_launch.LAUNCH.warps, tmp_path)
    assert used.stack <= 8
    assert used.registers <= 168


def test_opcheck() -> None:
    """The operator as CUDA devices see it, with the plain step in place of the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 4, 6, generator=generator).bfloat16() for _ in range(2))
    B, C = (torch.randn(2, 2, 5, generator=generator).bfloat16() for _ in range(2))
    state, dt = torch.randn(2, 4, 6, 5, generator=generator), torch.randn(2, 4, generator=generator).bfloat16()
    A, vector = -torch.rand(4, generator=generator), torch.randn(4, generator=generator)
    for arguments in (
        (state, x, dt, A, B, C, vector, z, vector, True, 0.0, 1.0),
        (state, x, dt, A, B, C, None, None, None, False, 0.0, 1.0),
    ):
        torch.library.opcheck(step._op, arguments, test_utils=("test_schema", "test_faketensor"))
