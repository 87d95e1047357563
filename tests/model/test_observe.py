"""The observer sees what the operator receives, not what the caller holds."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from mamba_train.model.observe import _arguments_by_name, observe_scans


def arguments(seed: int = 0, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch, length, channels, states = 2, 5, 6, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    values: dict[str, Any] = {
        "x": draw(batch, length, channels),
        "dt": draw(batch, length, channels),
        "A": -torch.rand(channels, states, generator=generator) - 0.1,
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": draw(channels),
        "z": draw(batch, length, channels),
        "dt_bias": draw(channels),
    }
    return {**values, **changes}


def test_each_call_is_recorded_in_order_with_the_operators_own_arguments() -> None:
    first, second = arguments(1), arguments(2)
    with observe_scans() as calls:
        outputs = [selective_scan(**first), selective_scan(**second, dt_softplus=False)]
    assert len(calls) == 2
    for call, given in zip(calls, (first, second), strict=True):
        for name, value in given.items():
            assert torch.equal(call[name], value), name
    assert (calls[0]["dt_softplus"], calls[1]["dt_softplus"]) == (True, False)
    assert calls[0]["seq_idx"] is None
    assert torch.equal(outputs[0], selective_scan(**first))


def test_calls_outside_the_block_are_not_recorded() -> None:
    selective_scan(**arguments())
    with observe_scans() as calls:
        pass
    selective_scan(**arguments())
    assert calls == []


def test_a_cast_on_the_way_to_the_operator_is_seen() -> None:
    values = arguments()
    stored = values["A"]
    with observe_scans() as calls:
        selective_scan(**{**values, "A": stored.bfloat16()})
    assert stored.dtype is torch.float32
    assert calls[0]["A"].dtype is torch.bfloat16


def test_gradients_are_the_same_under_observation() -> None:
    def gradient(observed: bool) -> torch.Tensor:
        values = arguments()
        values["A"].requires_grad_()
        if observed:
            with observe_scans() as calls:
                selective_scan(**values).square().sum().backward()
            assert len(calls) == 1
            assert not calls[0]["A"].requires_grad  # the observer stands below autograd
        else:
            selective_scan(**values).square().sum().backward()
        return values["A"].grad

    assert torch.equal(gradient(observed=True), gradient(observed=False))


def test_a_checkpointed_forward_is_recorded_once() -> None:
    values = arguments()
    values["x"].requires_grad_()
    with observe_scans() as calls:
        y = checkpoint(lambda x: selective_scan(**{**values, "x": x}), values["x"], use_reentrant=False)
    y.sum().backward()
    assert len(calls) == 1


def test_defaults_that_the_dispatcher_strips_are_filled_in() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    named = _arguments_by_name(torch.ops.aten.add.Tensor, (a, b), {})
    assert list(named) == ["self", "other", "alpha"]
    assert named["alpha"] == 1
    assert _arguments_by_name(torch.ops.aten.add.Tensor, (a, b), {"alpha": 3})["alpha"] == 3


def test_ssd_is_recorded_too_in_the_order_of_the_layers() -> None:
    first = arguments()
    x, dt, B = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 2, 6)
    A, D, dt_bias = -torch.rand(4), torch.randn(4), torch.randn(4)
    with observe_scans() as calls:
        ssd(x, dt, A.bfloat16(), B, B, D, dt_bias=dt_bias)
        selective_scan(**first)
    assert [call["A"].dim() for call in calls] == [1, 2]
    assert calls[0]["A"].dtype is torch.bfloat16
    for name, value in {"D": D, "dt_bias": dt_bias, "dt": dt}.items():
        assert torch.equal(calls[0][name], value)
