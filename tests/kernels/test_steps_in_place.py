"""Decode steps that overwrite their state, and those that take log(-A) as models store it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d_step
from kernels.selective_scan import selective_scan_step
from kernels.ssd import ssd_step

Step = Callable[..., tuple[Tensor, Tensor]]


def conv() -> dict[str, Tensor]:
    return {
        "state": torch.randn(2, 3, 6),
        "x": torch.randn(2, 6),
        "weight": torch.randn(6, 4),
        "bias": torch.randn(6),
    }


def scan() -> dict[str, Tensor]:
    return {
        "state": torch.randn(2, 6, 4),
        **{name: torch.randn(2, 6) for name in ("x", "dt", "z")},
        "A": -torch.rand(6, 4),
        **{name: torch.randn(2, 4) for name in ("B", "C")},
        **{name: torch.randn(6) for name in ("D", "dt_bias")},
    }


def ssd() -> dict[str, Tensor]:
    return {
        "state": torch.randn(2, 6, 5, 4),
        **{name: torch.randn(2, 6, 5) for name in ("x", "z")},
        "dt": torch.randn(2, 6),
        "A": -torch.rand(6),
        **{name: torch.randn(2, 3, 4) for name in ("B", "C")},
        **{name: torch.randn(6) for name in ("D", "dt_bias")},
    }


STEPS = [(causal_conv1d_step, conv), (selective_scan_step, scan), (ssd_step, ssd)]


@pytest.mark.parametrize(("step", "draw"), STEPS)
def test_the_state_becomes_the_new_one(step: Step, draw: Callable[[], dict[str, Tensor]]) -> None:
    inputs = draw()
    before = inputs["state"].clone()
    y, new_state = step(**inputs)
    assert torch.equal(inputs["state"], before)
    found, state = step(**inputs, in_place=True)
    assert state is inputs["state"]
    assert torch.equal(found, y)
    assert torch.equal(state, new_state)


@pytest.mark.parametrize(("step", "draw"), STEPS)
def test_a_state_that_cannot_be_overwritten(step: Step, draw: Callable[[], dict[str, Tensor]]) -> None:
    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            step(**(draw() | changed), in_place=True)

    state = draw()["state"]
    refused("no_grad", state=state.requires_grad_())
    refused("contiguous", state=state.detach().transpose(-1, -2).contiguous().transpose(-1, -2))
    with torch.no_grad():
        step(**(draw() | {"state": state}), in_place=True)


@pytest.mark.parametrize(("step", "draw"), STEPS)
def test_a_state_of_another_dtype_is_rounded_once_a_step(step: Step, draw: Callable[[], dict[str, Tensor]]) -> None:
    inputs = draw()
    inputs["state"] = inputs["state"].bfloat16()
    y, new_state = step(**inputs)
    found, state = step(**inputs, in_place=True)
    assert torch.equal(found, y)
    assert torch.equal(state, new_state.bfloat16())


@pytest.mark.parametrize(("step", "draw"), STEPS[1:])
def test_a_state_in_fp16_stays_at_the_largest_number(step: Step, draw: Callable[[], dict[str, Tensor]]) -> None:
    inputs = draw()
    inputs["state"] = (1e4 * inputs["state"]).half()
    inputs["x"][0] *= 1e6
    _, new_state = step(**inputs)
    _, state = step(**inputs, in_place=True)
    assert (new_state.abs() > 65504).any()
    assert torch.equal(state, new_state.clamp(-65504, 65504).half())


@pytest.mark.parametrize(("step", "draw"), STEPS[1:])
def test_the_logarithm_of_the_rates(step: Step, draw: Callable[[], dict[str, Tensor]]) -> None:
    inputs = draw()
    expected = step(**inputs)
    found = step(**(inputs | {"A": inputs["A"].neg().log()}), A_is_log=True)
    torch.testing.assert_close(found, expected)
