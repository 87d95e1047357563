"""SSD's decode step in Triton interpreted on the CPU, against the plain step in fp64; run by test_triton_step."""

import math

import pytest
import torch
from torch import Tensor

from kernels.ssd import ssd_step, step_launch

# The interpreter cuts what a GPU rounds to bf16.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def draw(
    batch: int, heads: int, head_dim: int, groups: int, states: int, dtype: torch.dtype, wide: bool
) -> dict[str, Tensor]:
    """wide: the activations are slices of wider tensors, and D is per channel."""

    def activation(*shape: int) -> Tensor:
        size = math.prod(shape)
        whole = torch.randn(batch, size + (5 if wide else 0)).to(dtype)
        return (whole[:, 2 : 2 + size] if wide else whole).unflatten(1, shape)

    return {
        "state": torch.randn(batch, heads, states, head_dim).transpose(2, 3),
        "x": activation(heads, head_dim),
        "dt": activation(heads),
        "A": -torch.rand(heads) * 4,
        "B": activation(groups, states),
        "C": activation(groups, states),
        "D": torch.randn(heads, head_dim) if wide else torch.randn(heads),
        "z": activation(heads, head_dim),
        "dt_bias": torch.randn(heads) - 4,
    }


def check(inputs: dict[str, Tensor], dt_softplus: bool = True, limit: tuple[float, float] = (0.0, math.inf)) -> None:
    before = inputs["state"].clone()
    found = step_launch.step(*(inputs.get(name) for name in NAMES), dt_softplus, *limit)  # type: ignore[arg-type]
    assert torch.equal(inputs["state"], before)
    exact = {name: value.double() for name, value in inputs.items()}
    wanted = ssd_step(**exact, dt_softplus=dt_softplus, dt_limit=limit)
    for actual, expected, dtype in zip(found, wanted, (inputs["x"].dtype, torch.float32), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert (actual.double() - expected).norm() <= ERROR[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4, 64, 2, 128), (6, 24, 3, 20), (2, 7, 1, 1000)], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_shapes(sizes: tuple[int, int, int, int], dtype: torch.dtype, wide: bool) -> None:
    check(draw(3, *sizes, dtype, wide))


@pytest.mark.parametrize("without", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_options(without: tuple[str, ...]) -> None:
    inputs = draw(2, 4, 16, 2, 16, torch.float32, wide=False)
    check({name: value for name, value in inputs.items() if name not in without})
    check(inputs | {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}, dt_softplus=False)
    check(inputs, limit=(0.01, 0.02))
