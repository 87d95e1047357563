"""The causal convolution against its definition, and the promises of its interface."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from tests.kernels.loops import LENGTHS, assert_all_close, conv_loop, floating, gradients, random_documents


def conv_inputs(length: int, width: int = 4, packed: bool = False, batch: int = 2, channels: int = 3) -> dict:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(10 * length + width)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    return inputs | ({"seq_idx": random_documents(batch, length, generator)} if packed else {})


def run(inputs: dict, silu: bool = True):  # type: ignore[no-untyped-def, type-arg]
    return causal_conv1d(**inputs, activation="silu" if silu else None, return_final_state=True)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_definition(length: int, width: int, packed: bool) -> None:
    inputs = conv_inputs(length, width, packed)
    for silu in (True, False):
        actual, expected = run(inputs, silu), conv_loop(inputs, silu)
        torch.testing.assert_close(actual, expected)
        assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("absent", [["bias"], ["initial_state"], ["bias", "initial_state"]])
def test_options_may_be_absent(absent: list[str]) -> None:
    inputs = {name: value for name, value in conv_inputs(9, packed=True).items() if name not in absent}
    actual, expected = run(inputs), conv_loop(inputs, silu=True)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu: bool) -> None:
    inputs = conv_inputs(6, packed=True)
    names = [name for name in inputs if name != "seq_idx"]

    def function(*values: torch.Tensor):  # type: ignore[no-untyped-def]
        return run({**dict(zip(names, values, strict=True)), "seq_idx": inputs["seq_idx"]}, silu)

    assert gradcheck(function, floating(inputs))


def test_only_the_final_state_takes_part() -> None:
    inputs = conv_inputs(2, packed=True)
    actual, expected = run(inputs)[1], conv_loop(inputs, silu=True)[1]
    assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), width=st.integers(1, 5), with_state=st.booleans())
def test_packed_equals_separate(lengths: list[int], width: int, with_state: bool) -> None:
    total = sum(lengths)
    inputs = conv_inputs(total, width)
    if not with_state:
        del inputs["initial_state"]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)
    packed = run(inputs | {"seq_idx": numbers.expand(2, total)})
    ys, begin = [], 0
    for length in lengths:
        own = dict(inputs, x=inputs["x"][:, begin : begin + length])
        if begin > 0:
            own.pop("initial_state", None)
        y, end = run(own)
        ys.append(y)
        begin += length
    separate = (torch.cat(ys, dim=1), end)
    torch.testing.assert_close(packed, separate)
    assert_all_close(gradients(packed, inputs), gradients(separate, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
def test_state_connects_two_halves(length: int) -> None:
    inputs = conv_inputs(length + 2)
    whole = run(inputs)
    first, state = run(dict(inputs, x=inputs["x"][:, :length]))
    second, end = run(dict(inputs, x=inputs["x"][:, length:], initial_state=state))
    halves = (torch.cat([first, second], dim=1), end)
    torch.testing.assert_close(halves, whole)
    assert_all_close(gradients(halves, inputs), gradients(whole, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 4])
def test_steps_equal_forward(length: int, width: int) -> None:
    inputs = {name: value.detach() for name, value in conv_inputs(length, width).items()}
    y, end = run(inputs)
    state, rows = inputs["initial_state"], []
    for t in range(length):
        row, state = causal_conv1d_step(state, inputs["x"][:, t], inputs["weight"], inputs["bias"], activation="silu")
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, dim=1), y)
    torch.testing.assert_close(state, end)


def test_low_precision() -> None:
    inputs = {k: v if k == "seq_idx" else v.detach() for k, v in conv_inputs(65, packed=True).items()}
    low = {k: v.to(torch.bfloat16) if k in ("x", "initial_state") else v for k, v in inputs.items()}
    low |= {k: v.float() for k, v in inputs.items() if k in ("weight", "bias")}
    low = {k: v.requires_grad_(k != "seq_idx") for k, v in low.items()}
    exact = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in low.items()}
    actual, expected = run(low), conv_loop(exact, silu=True)
    assert actual[0].dtype == actual[1].dtype == torch.bfloat16
    found, wanted = gradients(actual, low), gradients(expected, exact)
    assert all(found[name].dtype == low[name].dtype for name in found)
    for a, e in [*zip(actual, expected, strict=True), *((found[n], wanted[n]) for n in found)]:
        assert (a.double() - e).abs().max() / e.abs().max() < 1e-2


def test_any_strides() -> None:
    inputs = conv_inputs(17)
    wide = torch.cat([inputs["x"], inputs["x"]], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    strided = dict(inputs, x=wide[:, :, 3:], weight=inputs["weight"].t().contiguous().t())
    actual, expected = run(strided), run(inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 4])
def test_opcheck(width: int) -> None:
    inputs = conv_inputs(9, width, packed=True)
    torch.library.opcheck(
        torch.ops.mamba_train.causal_conv1d.default,
        (inputs["x"], inputs["weight"], inputs["bias"], True, inputs["seq_idx"], inputs["initial_state"]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = conv_inputs(9, packed=True)
    actual, expected = torch.compile(run, fullgraph=True, backend=backend)(inputs), run(inputs)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 3)),
        ("x", (2, 0, 3)),
        ("weight", (4, 4)),
        ("weight", (3, 0)),
        ("bias", (4,)),
        ("initial_state", (2, 4, 3)),
        ("seq_idx", (2, 4)),
    ],
)
def test_errors_name_the_argument_and_its_shape(name: str, shape: tuple[int, ...]) -> None:
    inputs = conv_inputs(5, packed=True)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=rf"causal_conv1d: {name} .*{str(shape)[1:-1]}.*expected"):
        run(inputs)


def test_errors_name_the_activation() -> None:
    inputs = conv_inputs(5)
    with pytest.raises(ValueError, match="activation is 'gelu', expected None or 'silu'"):
        causal_conv1d(**inputs, activation="gelu")  # type: ignore[arg-type]
