"""The kernels interpreted on the CPU, against the operators that they stand for; run by test_mamba_step."""

import pytest
import torch

from kernels.mamba_step import launch, reference
from tests.kernels.mamba_step.inputs import draw

# In bf16 the interpreter cuts what a GPU rounds, and so do the operators that it is compared with not.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize(
    ("batch", "channels", "rank", "states", "width"), [(1, 1, 1, 1, 1), (2, 200, 12, 16, 4), (3, 130, 7, 3, 2)]
)
def test_step(batch: int, channels: int, rank: int, states: int, width: int, dtype: torch.dtype) -> None:
    inputs = draw(batch, channels, rank, states, width, dtype)
    exact = {name: value.double() for name, value in inputs.items()}
    found = launch.step_(**inputs)
    wanted = reference.step_(**exact)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= ERROR[dtype] * wanted.norm()
    for name in ("conv_state", "scan_state"):
        assert (inputs[name].double() - exact[name]).norm() <= ERROR[dtype] * exact[name].norm()
