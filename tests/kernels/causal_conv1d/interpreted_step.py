"""The decode step's Triton kernel interpreted on the CPU, against the plain step in fp64; run by test_triton_step."""

import pytest
import torch

from kernels.causal_conv1d import causal_conv1d_step, step

# The interpreter cuts what a GPU rounds to bf16.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("width", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("channels", [1, 300])
@pytest.mark.parametrize("plain", [False, True])
def test_step(width: int, channels: int, dtype: torch.dtype, plain: bool) -> None:
    """plain: contiguous, without bias and activation."""
    x = torch.randn(3, 2 * channels).to(dtype)[:, :channels]
    state, weight = torch.randn(3, channels, width - 1).to(dtype).transpose(1, 2), torch.randn(width, channels).t()
    if plain:
        x, state, weight = x.contiguous(), state.contiguous(), weight.contiguous()
    bias = None if plain else torch.randn(channels)
    before = state.clone()
    found = step.launch(state, x, weight, bias, not plain)
    assert torch.equal(state, before)
    exact = [None if value is None else value.double() for value in (state, x, weight, bias)]
    y, new_state = causal_conv1d_step(*exact, activation=None if plain else "silu")  # type: ignore[arg-type]
    assert found[0].dtype == found[1].dtype == dtype
    assert (found[0].double() - y).norm() <= ERROR[dtype] * y.norm()
    assert torch.equal(found[1].double(), new_state)


def test_the_state_keeps_its_dtype() -> None:
    y, state = step.launch(torch.randn(2, 3, 8), torch.randn(2, 8).bfloat16(), torch.randn(8, 4), None, True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_in_place(width: int) -> None:
    state, x, weight = torch.randn(3, width - 1, 300), torch.randn(3, 300), torch.randn(300, width)
    y, new_state = step.launch(state, x, weight, None, True)
    assert torch.equal(step.launch_(state, x, weight, None, True), y)
    assert torch.equal(state, new_state)
