"""The CUDA scan on the CPU, by an emulation, beside the reference in fp64: all gradients, any number of segments."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.selective_scan.cuda import scan, variants
from tests.kernels.selective_scan import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs g++ to compile the CUDA sources for the CPU")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def make_inputs(batch: int, length: int, channels: int, states: int, padding: int) -> dict[str, Tensor]:
    """padding: elements that lie between the rows of the activations."""

    def activation(width: int) -> Tensor:
        return torch.randn(batch, length, width + padding)[..., padding // 2 :][..., :width]

    values = (activation(channels), activation(channels), -4 * torch.rand(channels, states) - 0.05)
    values += (activation(states), activation(states), torch.randn(channels), activation(channels))
    values += (torch.randn(channels) - 2, torch.randn(batch, channels, states))
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward", "packed", "padding", "without"),
    [
        ((2, 50, 40, 16), 1, 1, False, 0, ()),
        ((2, 150, 40, 16), 3, 4, True, 0, ()),
        pytest.param((1, 163, 70, 16), 5, 4, True, 5, ("z", "dt_bias"), marks=pytest.mark.slow),
        pytest.param((1, 33, 9, 64), 3, 3, False, 0, ("D",), marks=pytest.mark.slow),
        pytest.param((1, 70, 5, 200), 2, 4, True, 3, (), marks=pytest.mark.slow),
    ],
)
def test_against_the_reference(
    sizes: tuple[int, int, int, int],
    forward: int,
    backward: int,
    packed: bool,
    padding: int,
    without: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, length, _, states = sizes
    launched = emulated.install(monkeypatch, tmp_path)
    if states > 128:
        monkeypatch.setattr(variants, "FREE_PARTS_BYTES", 0)  # a block takes several groups of channels in turn
    torch.manual_seed(0)
    inputs = make_inputs(*sizes, padding)
    seq_idx = (torch.rand(batch, length) < 0.05).cumsum(1).int() if packed else None
    softplus = "dt_bias" not in without
    if not softplus:
        inputs["dt"] = 0.3 * inputs["dt"].abs()
    given = [None if name in without else inputs[name] for name in NAMES]

    monkeypatch.setattr(variants, "_side_by_side", lambda *_: forward)
    y, final_state, starts, ungated = scan.forward(*given[:8], softplus, seq_idx, given[8], True)  # type: ignore[arg-type]
    grads = torch.randn_like(y), torch.randn_like(final_state)
    monkeypatch.setattr(variants, "_side_by_side", lambda *_: backward)
    found = scan.backward(*grads, *given[:8], softplus, seq_idx, starts, ungated)  # type: ignore[arg-type]
    assert launched.count("scan_ends") == (forward > 1) + (backward > 1)

    exact = [None if value is None else value.double().requires_grad_() for value in given]
    expected = torch.ops.mamba_train.selective_scan(*exact[:8], softplus, seq_idx, exact[8], True)
    wanted = [value for value in exact if value is not None]
    expected_grads = torch.autograd.grad(expected[:2], wanted, [grad.double() for grad in grads])
    results = [y, final_state, *(grad for grad, value in zip(found, given, strict=True) if value is not None)]
    names = ["y", "final_state", *(name for name in NAMES if name not in without)]
    for name, a, b in zip(names, results, [*expected[:2], *expected_grads], strict=True):
        assert (a - b).norm() < 2e-6 * b.norm(), name


@pytest.mark.parametrize(
    ("sizes", "rings", "processors", "packed", "padding", "without"),
    [
        ((1, 60, 80, 16), 2, 1, True, 0, ()),  # three units for two blocks
        pytest.param((1, 700, 96, 16), 1, 2, False, 0, ("D",), marks=pytest.mark.slow),
        pytest.param((1, 163, 70, 13), 2, 1, True, 5, ("z", "dt_bias"), marks=pytest.mark.slow),
        pytest.param((3, 1, 33, 16), 1, 2, False, 0, (), marks=pytest.mark.slow),
    ],
)
def test_warps_that_take_turns(
    sizes: tuple[int, int, int, int],
    rings: int,
    processors: int,
    packed: bool,
    padding: int,
    without: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chained forward: also what it saves for the backward."""
    batch, length, _, states = sizes
    launched = emulated.install(monkeypatch, tmp_path, processors)
    torch.manual_seed(0)
    inputs = make_inputs(*sizes, padding)
    seq_idx = (torch.rand(batch, length) < 0.05).cumsum(1).int() if packed else None
    softplus = "dt_bias" not in without
    if not softplus:
        inputs["dt"] = 0.3 * inputs["dt"].abs()
    given = [None if name in without else inputs[name] for name in NAMES]
    results = []
    chained = dataclasses.replace(variants.chained_variant(1, 1, 1), rings=rings)
    for plan in (chained, variants.forward_variant(states, 1, 64, 100)):
        monkeypatch.setattr(variants, "forward_plan", lambda *_, plan=plan: (plan, 1))
        results.append(scan.forward(*given[:8], softplus, seq_idx, given[8], True))  # type: ignore[arg-type]
    assert launched == ["scan_chained", "scan_forward"]
    exact = [None if value is None else value.double() for value in given]
    expected = torch.ops.mamba_train.selective_scan(*exact[:8], softplus, seq_idx, exact[8], True)
    for name, a, b in zip(("y", "final_state"), results[0][:2], expected[:2], strict=True):
        assert (a - b).norm() < 1e-6 * b.norm(), name
    for name, a, b in zip(("saved states", "y before the gate"), results[0][2:], results[1][2:], strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-6 * b.norm(), name
