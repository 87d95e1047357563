"""The convolution's Triton kernels on the CPU, against the definition in fp64; test_triton.py runs this."""

import os

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import backward_into, causal_conv1d, launch, reference
from tests.kernels.causal_conv1d.test_causal_conv1d import conv_inputs
from tests.kernels.loops import conv_loop, gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "the kernels would be compiled, not interpreted"
reference.causal_conv1d_op.register_kernel("cpu")(launch.forward)
reference.causal_conv1d_backward_op.register_kernel("cpu")(launch.backward)
backward_into.causal_conv1d_backward_into.register_kernel("cpu")(backward_into.launch_into)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


REAL_FORWARD, REAL_SUM = launch.FORWARD, launch.sum_shape
FORWARD = launch.Shape(block=8, warps=2, unroll=4, steps=4, stretches=2)
BACKWARD = {
    "walks": launch.Shape(block=8, warps=1, unroll=4, steps=12),
    "one round": launch.Shape(block=8, warps=2, unroll=8, steps=8, stretches=2),
}


@pytest.fixture(autouse=True, params=list(BACKWARD))
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs small enough for a few positions to need several; which kind the backward has."""
    monkeypatch.setattr(launch, "FORWARD", FORWARD)
    monkeypatch.setattr(launch, "backward_shape", lambda *_: BACKWARD[request.param])
    monkeypatch.setattr(launch, "sum_shape", lambda *_: (4, 8))
    return request.param


def check(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, silu: bool = True) -> None:
    def typed(name: str, value: Tensor) -> Tensor:
        if name == "seq_idx":
            return value
        rounded = value.detach().to(torch.float32 if name in ("weight", "bias") else dtype)
        return rounded.requires_grad_()

    low = {name: typed(name, value) for name, value in inputs.items()}
    exact = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in low.items()}
    actual = causal_conv1d(**low, activation="silu" if silu else None, return_final_state=True)  # type: ignore[arg-type]
    expected = conv_loop(exact, silu)
    found, wanted = gradients(actual, low), gradients(expected, exact)
    for name, a, e in [
        ("y", actual[0], expected[0]),
        ("state", actual[1], expected[1]),
        *((f"d{name}", found[name], wanted[name]) for name in found),
    ]:
        assert a.shape == e.shape
        assert float((a.double() - e).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(e.abs().max())), name


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 3), (3, 4), (9, 2), (21, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_definition(length: int, width: int, packed: bool) -> None:
    check(conv_inputs(length, width, packed, channels=11))


def test_the_shapes_that_gpus_run(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = {"walks": launch.Shape(128, 1, unroll=4, steps=16), "one round": launch.BACKWARD_ONCE}[small]
    monkeypatch.setattr(launch, "FORWARD", REAL_FORWARD)
    monkeypatch.setattr(launch, "backward_shape", lambda *_: backward)
    monkeypatch.setattr(launch, "sum_shape", REAL_SUM)
    check(conv_inputs(101, channels=200))


@pytest.mark.parametrize("absent", [["bias"], ["initial_state"]])
def test_options_may_be_absent(absent: list[str]) -> None:
    inputs = {name: value for name, value in conv_inputs(10, packed=True).items() if name not in absent}
    check(inputs, silu=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(conv_inputs(17, packed=True, channels=16), dtype)


def test_only_the_final_state_takes_part() -> None:
    inputs = {k: v if k == "seq_idx" else v.detach().float() for k, v in conv_inputs(2, packed=True).items()}
    inputs = {k: v.requires_grad_(k != "seq_idx") for k, v in inputs.items()}
    exact = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
    state = causal_conv1d(**inputs, return_final_state=True)[1]  # type: ignore[arg-type]
    found, wanted = gradients((state,), inputs), gradients(conv_loop(exact, silu=False)[1:], exact)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [16, 12, 5])
def test_views_are_read_as_they_are(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a projection's output, rows of every alignment, batch and length exchanged: no copy of x."""
    x = torch.randn(7, 2, 2 * channels).transpose(0, 1)[..., channels:]
    weight, bias = torch.randn(channels, 4), torch.randn(channels)
    expected = causal_conv1d(x.contiguous(), weight, bias, activation="silu")
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: pytest.fail("a copy") if tensor.dim() == 3 else tensor)
    assert torch.equal(causal_conv1d(x, weight, bias, activation="silu"), expected)


@pytest.mark.parametrize("summands", [1, 2])
def test_a_gradient_written_into_half_of_a_tensor(summands: int) -> None:
    """Of rows twice as far apart as they need to be, the other half of which stays as it is."""
    inputs = conv_inputs(21, packed=True, channels=11)
    x, weight, bias = (inputs[name].detach().float() for name in ("x", "weight", "bias"))
    grad, more = torch.randn_like(x), torch.randn_like(x) if summands == 2 else None
    total = grad if more is None else grad + more
    expected = launch.backward(total, None, x, weight, bias, True, inputs["seq_idx"], None)
    both = torch.full((x.shape[0], 21, 22), 7.0)
    weight_grad, bias_grad = torch.ops.mamba_train.causal_conv1d_backward_into(
        grad, more, x, weight, bias, inputs["seq_idx"], both[..., 11:]
    )
    assert torch.equal(both[..., 11:], expected[0])
    assert torch.equal(both[..., :11], torch.full_like(x, 7.0))
    assert torch.equal(weight_grad, expected[1])
    assert torch.equal(bias_grad, expected[2])
