"""That launches go around Triton rightly: what the launcher takes for numbers and constants are such parameters."""

import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from kernels.launcher import Launch, Piece
from kernels.ssd import launch, launch_backward
from tests.kernels.ssd.loops import ssd_inputs

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.mark.parametrize("absent", [(), ("z", "initial_state", "seq_idx", "D")], ids=str)
def test_arguments_fit_parameters(absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def check(self: Launch, *tensors: Any) -> None:
        kernel: Any = self.kernel
        first, second = len(tensors), len(tensors) + len(self.numbers)
        assert len(kernel.params) == second + len(self.constants)
        for parameter, tensor in zip(kernel.params[:first], tensors, strict=True):
            assert not parameter.do_not_specialize, parameter.name
            assert not parameter.is_constexpr, parameter.name
            assert tensor is None or isinstance(tensor, torch.Tensor | Piece)
        for parameter, number in zip(kernel.params[first:second], self.numbers, strict=True):
            assert parameter.do_not_specialize, parameter.name
            assert isinstance(number, float) == (parameter.name in ("dt_min", "dt_max")), parameter.name
        assert all(parameter.is_constexpr for parameter in kernel.params[second:])
        seen.add(kernel.__name__)

    monkeypatch.setattr(Launch, "__call__", check)
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "processors", lambda index: 64)
    monkeypatch.setattr(launch, "has_large_shared_memory", lambda index: True)
    given = {k: v.detach() for k, v in ssd_inputs(1, 1100, 2, 16, 1, 200, packed=True).items() if k not in absent}
    arguments = [given.get(name) for name in NAMES]
    options: Any = (True, 0.0, 1.0, 16, given.get("seq_idx"))
    y, state, starts, ungated = launch.forward(*arguments, *options, given.get("initial_state"), True, True)  # type: ignore[arg-type]
    launch_backward.backward(y, state, *arguments, *options, starts, ungated, True)  # type: ignore[arg-type]
    expected = {"decays_kernel", "states_kernel", "segments_kernel", "forward_kernel", "gradients_kernel"}
    expected |= {"flows_kernel", "delta_kernel", "head_sums_kernel", "sum_BC_kernel"} | (
        set() if absent else {"gate_backward_kernel"}
    )
    assert seen == expected


def test_one_workspace_at_a_time_where_states_are_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    usual = launch_backward.workspace

    def workspace(*arguments: Any) -> Any:
        assert all(reference() is None for reference in made)
        found = usual(*arguments)
        made.append(weakref.ref(found.sums.of_flows.whole))
        return found

    monkeypatch.setattr(launch_backward, "workspace", workspace)
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: None)
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "processors", lambda index: 64)
    monkeypatch.setattr(launch, "has_large_shared_memory", lambda index: True)
    given = {k: v.detach() for k, v in ssd_inputs(1, 70, 2, 64, 1, 300).items()}
    arguments = [given.get(name) for name in NAMES]
    options: Any = (True, 0.0, 1.0, 16, None)
    y, state, *kept = launch.forward(*arguments, *options, None, True, True)  # type: ignore[arg-type]
    launch_backward.backward(y, state, *arguments, *options, *kept, True)  # type: ignore[arg-type]
    assert len(made) == 3
