"""The reference scan against its definition, and the promises of its interface."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kernels.selective_scan import plan, reference, selective_scan, selective_scan_step
from tests.kernels.loops import (
    LENGTHS,
    assert_all_close,
    floating,
    gradients,
    largest_tensor_in,
    scan_inputs,
    scan_loop,
)


@pytest.fixture(params=["whole", "blocks", "groups"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small sizes never need the blocks, chunks and groups that real ones do, so they are forced."""
    threads = 2 if request.param == "groups" else 1
    monkeypatch.setattr(plan.torch, "get_num_threads", lambda: threads)
    if request.param == "whole":
        monkeypatch.setattr(plan, "MIN_BLOCK", 10**6)
    else:
        monkeypatch.setattr(plan, "MIN_BLOCK", 7)
        monkeypatch.setattr(plan, "MIN_CHUNK", 3)
        monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 1)
    return request.param


def run(inputs: dict, **options):  # type: ignore[no-untyped-def, type-arg]
    return selective_scan(**inputs, return_final_state=True, **options)


def part(inputs: dict, rows: slice, initial_state=None):  # type: ignore[no-untyped-def, type-arg]
    """The inputs at some positions, without the document numbers."""
    along = ("x", "dt", "B", "C", "z")
    out = {k: (v[:, rows] if k in along else v) for k, v in inputs.items() if k not in ("seq_idx", "initial_state")}
    return out if initial_state is None else out | {"initial_state": initial_state}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_definition(length: int, packed: bool, cut: str) -> None:
    inputs = scan_inputs(2, length, packed=packed)
    actual, expected = run(inputs), scan_loop(inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state", "all"])
def test_options_may_be_absent(absent: str) -> None:
    inputs = scan_inputs(2, 9)
    for name in ("D", "z", "dt_bias", "initial_state") if absent == "all" else (absent,):
        del inputs[name]
    for softplus in (True, False):
        actual, expected = run(inputs, dt_softplus=softplus), scan_loop(inputs, dt_softplus=softplus)
        torch.testing.assert_close(actual, expected)
        assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


def test_gradcheck(cut: str) -> None:
    inputs = scan_inputs(2, 9, 2, 3, packed=True)
    names = [name for name in inputs if name != "seq_idx"]

    def function(*values: torch.Tensor):  # type: ignore[no-untyped-def]
        return run({**dict(zip(names, values, strict=True)), "seq_idx": inputs["seq_idx"]})

    assert gradcheck(function, floating(inputs), fast_mode=False)


def test_only_some_inputs_and_outputs_take_part() -> None:
    inputs = {name: value.detach() for name, value in scan_inputs(2, 20).items()}
    inputs["dt"].requires_grad_()
    for index in (0, 1):
        actual, expected = run(inputs)[index], scan_loop(inputs)[index]
        assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), with_state=st.booleans())
def test_packed_equals_separate(lengths: list[int], with_state: bool) -> None:
    total = sum(lengths)
    inputs = scan_inputs(2, total)
    if not with_state:
        del inputs["initial_state"]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)
    packed = run(inputs | {"seq_idx": numbers.expand(2, total)})

    ys, begin = [], 0
    for length in lengths:
        state = inputs.get("initial_state") if begin == 0 else None
        y, end = run(part(inputs, slice(begin, begin + length), state))
        ys.append(y)
        begin += length
    separate = (torch.cat(ys, dim=1), end)
    torch.testing.assert_close(packed, separate)
    assert_all_close(gradients(packed, inputs), gradients(separate, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_state_connects_two_halves(length: int) -> None:
    inputs = scan_inputs(2, length + 5)
    whole = run(inputs)
    first, state = run(part(inputs, slice(0, length), inputs["initial_state"]))
    second, end = run(part(inputs, slice(length, None), state))
    halves = (torch.cat([first, second], dim=1), end)
    torch.testing.assert_close(halves, whole)
    assert_all_close(gradients(halves, inputs), gradients(whole, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_steps_equal_forward(length: int) -> None:
    inputs = {name: value.detach() for name, value in scan_inputs(2, length).items()}
    y, end = run(inputs)
    state, rows = inputs["initial_state"], []
    shared = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    for t in range(length):
        now = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C", "z")}
        row, state = selective_scan_step(state, **now, **shared)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, dim=1), y)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("softplus", [True, False])
def test_step_without_options(softplus: bool) -> None:
    inputs = {name: value.detach() for name, value in scan_inputs(2, 1).items()}
    bare = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    y, end = run(bare, dt_softplus=softplus)
    now = {name: value if name == "A" else value[:, 0] for name, value in bare.items()}
    step, state = selective_scan_step(torch.zeros_like(end), **now, dt_softplus=softplus)
    torch.testing.assert_close(step, y[:, 0])
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float, cut: str) -> None:
    """A, D, dt_bias and the state stay fp32; the rest and the result have the dtype of the activations."""
    wide = ("A", "D", "dt_bias", "initial_state")
    exact = {k: v.detach() for k, v in scan_inputs(2, 65, packed=True).items()}
    inputs = {k: v if k == "seq_idx" else v.to(torch.float32 if k in wide else dtype) for k, v in exact.items()}
    inputs = {k: v.requires_grad_(k != "seq_idx") for k, v in inputs.items()}
    rounded = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual, expected = run(inputs), scan_loop(rounded)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    found, wanted = gradients(actual, inputs), gradients(expected, rounded)
    assert all(found[name].dtype == inputs[name].dtype for name in found)
    for name, a, e in [("y", actual[0], expected[0]), ("state", actual[1], expected[1])] + [
        (name, found[name], wanted[name]) for name in found
    ]:
        error = (a.double() - e).abs().max() / e.abs().max()
        assert error < tolerance, f"{name}: {error}"


def test_any_strides() -> None:
    inputs = scan_inputs(2, 17)
    fused = (
        torch.cat([inputs[k] for k in ("x", "dt", "z", "B", "C")], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    )
    x, dt, z, B, C = fused.split([3, 3, 3, 4, 4], dim=2)
    strided = inputs | {"x": x, "dt": dt, "z": z, "B": B, "C": C, "A": inputs["A"].t().contiguous().t()}
    assert not x.is_contiguous()
    torch.testing.assert_close(run(strided), run(inputs), rtol=0, atol=0)
    grad = torch.randn(3, 2, 17).permute(1, 2, 0).double()
    for a, b in zip(*(torch.autograd.grad(run(i)[0], inputs["x"], grad) for i in (strided, inputs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 30.0, 1e3, 1e30])
def test_extreme_decays(scale: float) -> None:
    """exp(Δ·A) from 1 to an underflow: no NaN, and the values of the definition."""
    inputs = scan_inputs(2, 40, dtype=torch.float32)
    inputs["A"] = (inputs["A"].detach() * scale).requires_grad_()
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    actual, expected = run(inputs), scan_loop(exact)
    found, wanted = gradients(actual, inputs), gradients(expected, exact)
    for a, e in [*zip(actual, expected, strict=True), *((found[n], wanted[n]) for n in found)]:
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.detach().abs().max()))


@pytest.mark.parametrize("shift", [-200.0, -60.0, 200.0])
def test_extreme_dt(shift: float) -> None:
    inputs = scan_inputs(2, 40, dtype=torch.float32)
    inputs["dt"] = (inputs["dt"].detach() + shift).requires_grad_()
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    actual, expected = run(inputs), scan_loop(exact)
    found, wanted = gradients(actual, inputs), gradients(expected, exact)
    for a, e in [*zip(actual, expected, strict=True), *((found[n], wanted[n]) for n in found)]:
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.detach().abs().max()) + 1e-38)


def test_backward_is_deterministic() -> None:
    inputs = scan_inputs(3, 130, 16, 4, packed=True, dtype=torch.float32)
    first, second = (gradients(run(inputs), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_operator_receives_the_parameters_uncast() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.mamba_train.selective_scan.default:
                seen.extend([args[2], args[5], args[7]])
            return func(*args, **(kwargs or {}))

    inputs = {name: value.detach() for name, value in scan_inputs(2, 5, dtype=torch.bfloat16).items()}
    inputs |= {name: inputs[name].float() for name in ("A", "dt_bias")}
    with Record():
        run(inputs)
    assert [t.dtype for t in seen] == [torch.float32, torch.bfloat16, torch.float32]
    assert seen[0].data_ptr() == inputs["A"].data_ptr()


def test_only_one_chunk_of_states_exists() -> None:
    """No tensor, saved or not, is as large as (batch, length, channel, state)."""
    batch, length, channels, states = 2, 1024, 64, 64
    inputs = {k: v.detach() for k, v in scan_inputs(batch, length, channels, states, dtype=torch.float32).items()}
    inputs.pop("initial_state")
    saved = []

    def forward_and_backward() -> None:
        x, dt, A, B, C, D, z, dt_bias = inputs.values()
        forward, backward = reference.selective_scan_op._init_fn, reference.selective_scan_backward_op._init_fn
        y, end, starts, ungated = forward(x, dt, A, B, C, D, z, dt_bias, True, None, None, True)
        saved.extend([starts, ungated])
        backward(y, end, x, dt, A, B, C, D, z, dt_bias, True, None, starts, ungated)

    everything = batch * length * channels * states
    assert largest_tensor_in(forward_and_backward) <= everything / 8
    assert sum(t.numel() for t in saved) <= everything / 7


def test_nothing_is_saved_without_gradients() -> None:
    inputs = scan_inputs(2, 65, dtype=torch.float32)
    arguments = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    _, _, starts, ungated = torch.ops.mamba_train.selective_scan(*arguments, True, None, None, False)
    assert starts.numel() == ungated.numel() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    inputs = scan_inputs(2, 33, packed=packed)
    arguments = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    torch.library.opcheck(
        torch.ops.mamba_train.selective_scan.default,
        (*arguments, True, inputs.get("seq_idx"), inputs["initial_state"], True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = scan_inputs(2, 33, packed=True)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    actual, expected = compiled(inputs), run(inputs)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 3)),
        ("x", (2, 0, 3)),
        ("x", (0, 5, 3)),
        ("x", (2, 5, 0)),
        ("A", (3, 0)),
        ("dt", (2, 5, 4)),
        ("A", (4, 3)),
        ("B", (2, 4, 4)),
        ("C", (2, 5, 3)),
        ("D", (4,)),
        ("z", (1, 5, 3)),
        ("dt_bias", (3, 1)),
        ("initial_state", (2, 4, 3)),
        ("seq_idx", (2, 4)),
    ],
)
def test_errors_name_the_argument_and_its_shape(name: str, shape: tuple[int, ...]) -> None:
    inputs = scan_inputs(2, 5, packed=True)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=rf"selective_scan: {name} .*{str(shape)[1:-1]}.*expected"):
        run(inputs)


def test_errors_name_dtypes_and_devices() -> None:
    inputs = scan_inputs(2, 5)
    with pytest.raises(ValueError, match=r"seq_idx has dtype torch.float32"):
        run(inputs | {"seq_idx": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"A has dtype torch.complex64"):
        run(inputs | {"A": torch.zeros(3, 4, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"B of shape .* is on meta, expected cpu"):
        run(inputs | {"B": torch.zeros(2, 5, 4, device="meta")})
    with pytest.raises(ValueError, match=r"selective_scan_step: state has shape \(2, 4, 3\)"):
        selective_scan_step(
            torch.zeros(2, 4, 3), *(torch.zeros(2, 3),) * 2, torch.zeros(3, 4), *(torch.zeros(2, 4),) * 2
        )
