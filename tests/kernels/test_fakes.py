"""What the fake implementations promise to the compiler: shape, stride and dtype of every output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kernels.causal_conv1d.backward_into
import kernels.selective_scan.backward_into  # noqa: F401  registers the operators
from kernels import (  # noqa: F401  registers the operators
    causal_conv1d,
    linear_cross_entropy,
    rms_norm,
    selective_scan,
    ssd,
)

OPS = torch.ops.mamba_train


def strided(*shape: int) -> torch.Tensor:
    """A random tensor whose rows lie twice as far apart as they need to, as a slice of a projection."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]


def scan_inputs(gate: bool = True) -> tuple[Any, ...]:
    x, dt, z = strided(2, 9, 6), strided(2, 9, 6), strided(2, 9, 6) if gate else None
    A = -torch.rand(6, 4)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32)
    return x, dt, A, strided(2, 9, 4), strided(2, 9, 4), torch.randn(6), z, torch.randn(6), True, seq_idx, None


def scan_backward_inputs(gate: bool = True) -> tuple[Any, ...]:
    inputs = scan_inputs(gate)
    _, final_state, starts, ungated = OPS.selective_scan(*inputs, True)
    return (strided(2, 9, 6), torch.randn_like(final_state), *inputs[:-1], starts, ungated)


def scan_into_inputs() -> tuple[Any, ...]:
    x, dt, A, B, C, D, z, dt_bias, _, seq_idx, _ = scan_inputs()
    _, _, starts, ungated = OPS.selective_scan(*scan_inputs(), True)
    outputs = torch.empty(2, 9, 6), torch.empty(2, 9, 6), strided(2, 9, 6)
    return (strided(2, 9, 6), x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated, *outputs)


def conv_into_inputs() -> tuple[Any, ...]:
    x = strided(2, 9, 6)
    return strided(2, 9, 6), strided(2, 9, 6), x, torch.randn(6, 4), torch.randn(6), None, strided(2, 9, 6)


def ssd_inputs(gate: bool = True) -> tuple[Any, ...]:
    x, z = strided(2, 9, 4, 3), strided(2, 9, 4, 3) if gate else None
    dt, A, D, dt_bias = strided(2, 9, 4), -torch.rand(4), torch.randn(4), torch.randn(4)
    B, C, seq_idx = strided(2, 9, 2, 5), strided(2, 9, 2, 5), torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    return x, dt, A, B, C, D, z, dt_bias, True, 0.0, 1.0, 4, seq_idx, None


def ssd_backward_inputs(gate: bool = True) -> tuple[Any, ...]:
    inputs = ssd_inputs(gate)
    _, final_state, starts, ungated = OPS.ssd(*inputs, True, True)
    return (strided(2, 9, 4, 3), torch.randn_like(final_state), *inputs[:-1], starts, ungated, gate)


def gated_backward_inputs() -> tuple[Any, ...]:
    x, z, weight = strided(2, 9, 6), strided(2, 9, 6), torch.randn(6)
    return strided(2, 9, 6), x, z, weight, OPS.gated_rms_norm(x, z, weight, 1e-5, 3, False)[1], False


def conv_backward_inputs(state: bool) -> tuple[Any, ...]:
    x, initial_state = strided(2, 9, 6), torch.randn(2, 3, 6) if state else None
    return strided(2, 9, 6), None, x, torch.randn(6, 4), torch.randn(6), True, None, initial_state


def norm_backward_inputs(with_total: bool) -> tuple[Any, ...]:
    x = strided(2, 9, 6)
    return strided(2, 9, 6), None, x, torch.rand(2, 9, 1), torch.randn(6), torch.bfloat16, with_total


CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "scan": (OPS.selective_scan, lambda: (*scan_inputs(), True)),
    "scan without gradient": (OPS.selective_scan, lambda: (*scan_inputs(gate=False), False)),
    "scan backward": (OPS.selective_scan_backward, scan_backward_inputs),
    "scan backward without gate": (OPS.selective_scan_backward, lambda: scan_backward_inputs(gate=False)),
    "scan backward into": (OPS.selective_scan_backward_into, scan_into_inputs),
    "ssd": (OPS.ssd, lambda: (*ssd_inputs(), True, True)),
    "ssd without gradient": (OPS.ssd, lambda: (*ssd_inputs(gate=False), False, False)),
    "ssd backward": (OPS.ssd_backward, ssd_backward_inputs),
    "ssd backward without gate": (OPS.ssd_backward, lambda: ssd_backward_inputs(gate=False)),
    "gated norm": (
        OPS.gated_rms_norm,
        lambda: (strided(2, 9, 6), strided(2, 9, 6), torch.randn(6), 1e-5, 3, False),
    ),
    "gated norm backward": (OPS.gated_rms_norm_backward, gated_backward_inputs),
    "conv": (OPS.causal_conv1d, lambda: (strided(2, 9, 6), torch.randn(6, 4), torch.randn(6), True, None, None)),
    "conv backward": (OPS.causal_conv1d_backward, lambda: conv_backward_inputs(state=True)),
    "conv backward without state": (OPS.causal_conv1d_backward, lambda: conv_backward_inputs(state=False)),
    "conv backward into": (OPS.causal_conv1d_backward_into, conv_into_inputs),
    "norm backward": (OPS.rms_norm_backward, lambda: norm_backward_inputs(with_total=True)),
    "norm backward without the sum's": (OPS.rms_norm_backward, lambda: norm_backward_inputs(with_total=False)),
    "norm": (OPS.rms_norm, lambda: (strided(2, 9, 6), torch.randn(6), 1e-5)),
    "add norm": (OPS.add_rms_norm, lambda: (strided(2, 9, 6), strided(2, 9, 6), torch.randn(6), 1e-5)),
    "first add norm": (OPS.add_rms_norm, lambda: (strided(2, 9, 6), None, torch.randn(6), 1e-5)),
    "loss": (
        OPS.linear_cross_entropy,
        lambda: (torch.randn(9, 6), torch.randn(11, 6), torch.arange(9), -100, 4, 1e-3, True, True),
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_what_the_fake_says(name: str) -> None:
    op, make_inputs = CASES[name]
    inputs = make_inputs()
    real = op(*inputs)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in inputs))
    for number, (a, b) in enumerate(zip(real, fake, strict=True)):
        assert a.dtype == b.dtype, number
        assert a.shape == b.shape, number
        if a.numel():
            assert a.stride() == b.stride(), number


@pytest.mark.parametrize("name", ["scan backward into", "conv backward into"])
@torch.no_grad()
def test_operators_write_what_their_schemas_say(name: str) -> None:
    op, make_inputs = CASES[name]
    torch.library.opcheck(op.default, make_inputs(), test_utils=("test_schema", "test_faketensor"))
