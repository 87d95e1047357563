"""The GPU's decode step as far as it can be tested without one."""

from pathlib import Path

import pytest
import torch

from kernels.causal_conv1d import step
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_step.py"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [4, 16])
def test_compiles_within_its_registers(capability: int, width: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.causal_conv1d.step_kernel import step_kernel

    pointers = dict.fromkeys(("state", "x", "y", "new_state"), "*bf16") | dict.fromkeys(("weight", "bias"), "*fp32")
    constants = {"WIDTH": width, "SILU": True, "CHANNELS": step.LAUNCH.channels, "PDL": capability >= 90}
    arguments = {name: (pointers | constants).get(name, "i32") for name in step_kernel.arg_names}
    assert compile_kernel(step_kernel, arguments, capability, step.LAUNCH.warps, tmp_path).stack <= 8


def test_opcheck() -> None:
    """The operator as CUDA devices see it, with the plain step in place of the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, state = torch.randn(2, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    for arguments in ((state, x, weight, bias, True), (state.bfloat16(), x.bfloat16(), weight, None, False)):
        for operator in (step._op, step._op_):
            torch.library.opcheck(operator._opoverload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_why_a_wide_filter_is_not_computed_in_triton() -> None:
    assert step.unsupported(torch.randn(2, 6), torch.randn(6, 17)) == "a filter of width 17 is wider than 16"
