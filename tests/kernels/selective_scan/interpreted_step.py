"""The decode step's Triton kernel interpreted on the CPU, against the plain step in fp64; run by test_triton_step."""

import pytest
import torch
from torch import Tensor

from kernels.selective_scan import selective_scan_step, step_launch

# The interpreter cuts what a GPU rounds to bf16.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}


def draw(batch: int, channels: int, states: int, dtype: torch.dtype, strided: bool) -> dict[str, Tensor]:
    def activation(width: int) -> Tensor:
        whole = torch.randn(batch, width + (5 if strided else 0)).to(dtype)
        return whole[:, 2 : 2 + width] if strided else whole

    state = torch.randn(batch, states, channels) if strided else torch.randn(batch, channels, states)
    return {
        "state": state.transpose(1, 2) if strided else state,
        "x": activation(channels),
        "dt": activation(channels),
        "A": -torch.rand(channels, states) * 4,
        "B": activation(states),
        "C": activation(states),
        "D": torch.randn(channels),
        "z": activation(channels),
        "dt_bias": torch.randn(channels) - 4,
    }


def check(inputs: dict[str, Tensor], dt_softplus: bool = True, A_is_log: bool = False) -> None:
    arguments = [inputs.get(name) for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    before = inputs["state"].clone()
    found = step_launch.step(*arguments, dt_softplus, A_is_log)  # type: ignore[arg-type]
    assert torch.equal(inputs["state"], before)
    exact = {name: value.double() for name, value in inputs.items()}
    wanted = selective_scan_step(**exact, dt_softplus=dt_softplus, A_is_log=A_is_log)
    for actual, expected, dtype in zip(found, wanted, (inputs["x"].dtype, torch.float32), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert (actual.double() - expected).norm() <= ERROR[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (40, 16), (33, 3), (7, 1000), (100, 8)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes(channels: int, states: int, dtype: torch.dtype, strided: bool) -> None:
    check(draw(3, channels, states, dtype, strided))


@pytest.mark.parametrize("without", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_options(without: tuple[str, ...]) -> None:
    inputs = draw(2, 20, 16, torch.float32, strided=False)
    check({name: value for name, value in inputs.items() if name not in without})
    check(inputs | {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}, dt_softplus=False)
    check(inputs | {"A": inputs["A"].abs().log()}, A_is_log=True)


@pytest.mark.parametrize("states", [1, 3, 16])
def test_in_place(states: int) -> None:
    inputs = draw(3, 40, states, torch.float32, strided=False)
    y, new_state = step_launch.step(*inputs.values(), True, False)  # type: ignore[arg-type]
    found = step_launch.step_(*inputs.values(), True, False)  # type: ignore[arg-type]
    assert torch.equal(found, y)
    assert torch.equal(inputs["state"], new_state)


def test_a_small_step_keeps_its_relative_accuracy() -> None:
    inputs = draw(2, 64, 4, torch.float32, strided=False)
    inputs["state"] = torch.zeros_like(inputs["state"])
    inputs["dt_bias"] = torch.linspace(-18, 25, 64)  # of which softplus is 1e-8 to 25
    check(inputs)
    _, found = step_launch.step(*inputs.values(), True, False)  # type: ignore[arg-type]
    _, wanted = selective_scan_step(**{name: value.double() for name, value in inputs.items()})
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=0)
