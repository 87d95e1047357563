"""Buckets of gradients in one process; what several ranks sum: tests/distributed."""

import pytest
import torch
from torch import nn

from mamba_train.parallel import buckets
from mamba_train.parallel.buckets import GradientBuckets


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each sum over the ranks had; there is another rank, whose gradients are the same."""
    sizes: list[int] = []

    class Done:
        def wait(self) -> None:
            pass

    def all_reduce(tensor: torch.Tensor, async_op: bool) -> Done:
        sizes.append(tensor.numel())
        tensor *= 2
        return Done()

    monkeypatch.setattr(buckets.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 4 * 10)
    return sizes


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def backward(gradients: GradientBuckets, parameters: list[nn.Parameter], *, is_last: bool) -> None:
    gradients.begin(is_last=is_last)
    torch.stack([(number * p).sum() for number, p in enumerate(parameters, start=1)]).sum().backward()
    gradients.finish()


def test_neighbours_travel_together_as_far_as_they_fit(summed: list[int]) -> None:
    parameters = weights(4, 4, 25, 6, 4, 7)
    gradients = GradientBuckets(parameters, torch.float32)
    places = [p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None]
    assert [places.index(place) for place in places] == [0, 0, 2, 3, 3, 5]
    backward(gradients, parameters, is_last=True)
    assert sorted(summed) == [7, 8, 10, 25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_all_passes_are_summed_after_the_last(summed: list[int], dtype: torch.dtype) -> None:
    parameters = weights(4, 4, 25)
    gradients = GradientBuckets(parameters, dtype)
    for _ in range(2):  # steps
        gradients.clear()
        summed.clear()
        backward(gradients, parameters, is_last=False)
        assert summed == []
        backward(gradients, parameters, is_last=True)
        assert sorted(summed) == [8, 25]
        for number, parameter in enumerate(parameters, start=1):
            assert parameter.grad is not None
            assert parameter.grad.tolist() == [2 * 2 * number] * parameter.numel()


def test_a_pass_that_failed_leaves_nothing_for_the_next(summed: list[int]) -> None:
    parameters = weights(4, 4)
    gradients = GradientBuckets(parameters, torch.float32)
    gradients.begin(is_last=True)
    torch.cat(parameters).sum().backward()
    assert summed == [8]  # on its way when something else fails
    gradients.clear()
    backward(gradients, parameters, is_last=True)
    assert summed == [8, 8]
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[2.0] * 4, [4.0] * 4]


def test_a_parameter_without_a_gradient_is_not_summed_in_part(summed: list[int]) -> None:
    parameters = weights(4, 4)
    gradients = GradientBuckets(parameters, torch.float32)
    with pytest.raises(AssertionError, match="a parameter got no gradient"):
        backward(gradients, parameters[:1], is_last=True)
