"""The decode step's Triton kernel interpreted on the CPU, against the plain step in fp64; run by test_triton_step."""

import math

import pytest
import torch
from torch import Tensor

from kernels.ssd import ssd_step, step_launch
from tests.kernels.triton_interpreter import drop_nan_as_a_gpu_does

# The interpreter cuts what a GPU rounds to bf16.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def draw(
    heads: int = 4, head_dim: int = 8, states: int = 16, groups: int = 2, dtype: torch.dtype = torch.float32,
    strided: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    def activation(*shape: int) -> Tensor:
        whole = torch.randn(3, 2 * math.prod(shape)).to(dtype)
        return whole[:, :: 2 if strided else 1][:, : math.prod(shape)].unflatten(1, shape)

    state = torch.randn(3, heads, head_dim, states)
    return {
        "state": state.transpose(2, 3).contiguous().transpose(2, 3) if strided else state,
        "x": activation(heads, head_dim),
        "dt": activation(heads),
        "A": -torch.rand(heads) * 4,
        "B": activation(groups, states),
        "C": activation(groups, states),
        "D": torch.randn(heads, head_dim) if strided else torch.randn(heads),
        "z": activation(heads, head_dim),
        "dt_bias": torch.randn(heads) - 4,
    }


def check(
    inputs: dict[str, Tensor],
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    A_is_log: bool = False,
) -> None:
    arguments = [inputs.get(name) for name in NAMES]
    before = inputs["state"].clone()
    found = step_launch.step(*arguments, softplus, *limit, A_is_log)  # type: ignore[arg-type]
    assert torch.equal(inputs["state"], before)
    exact = {name: value.double() for name, value in inputs.items()}
    wanted = ssd_step(**exact, dt_softplus=softplus, dt_limit=limit, A_is_log=A_is_log)
    for actual, expected, dtype in zip(found, wanted, (inputs["x"].dtype, torch.float32), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert (actual.double() - expected).norm() <= ERROR[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize(
    ("heads", "head_dim", "states", "groups"), [(1, 1, 1, 1), (4, 64, 128, 1), (6, 5, 3, 3), (2, 32, 256, 2)]
)
@pytest.mark.parametrize("strided", [False, True])
def test_shapes(heads: int, head_dim: int, states: int, groups: int, dtype: torch.dtype, strided: bool) -> None:
    check(draw(heads, head_dim, states, groups, dtype, strided))


@pytest.mark.parametrize("without", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_options(without: tuple[str, ...]) -> None:
    inputs = draw()
    check({name: value for name, value in inputs.items() if name not in without})
    check(inputs | {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}, softplus=False)
    check(inputs, limit=(0.01, 0.02))
    check(inputs | {"A": inputs["A"].abs().log()}, A_is_log=True)


def test_in_place() -> None:
    inputs = draw()
    options = (True, 0.0, math.inf, False)
    y, new_state = step_launch.step(*(inputs[name] for name in NAMES), *options)
    assert torch.equal(step_launch.step_(*(inputs[name] for name in NAMES), *options), y)
    assert torch.equal(inputs["state"], new_state)


def test_nan_in_delta_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_nan_as_a_gpu_does(monkeypatch)
    inputs = draw()
    inputs["dt"][1, 2] = math.nan
    y, new_state = step_launch.step(*(inputs[name] for name in NAMES), True, 0.0, math.inf, False)
    for found in (y, new_state):
        assert found[1, 2].isnan().all()
        found[1, 2] = 0
        assert found.isfinite().all()
