"""SSD against its recurrence, and the promises of its interface."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kernels.selective_scan import selective_scan
from kernels.ssd import backward_plan, reference, ssd, ssd_step
from tests.kernels.loops import LENGTHS, assert_all_close, floating, gradients, largest_tensor_in
from tests.kernels.ssd.loops import ssd_inputs, ssd_loop


def run(inputs: dict, chunk_size: int = 16, **options):  # type: ignore[no-untyped-def, type-arg]
    return ssd(**inputs, chunk_size=chunk_size, return_final_state=True, **options)


def part(inputs: dict, rows: slice, initial_state=None):  # type: ignore[no-untyped-def, type-arg]
    """The inputs at some positions, without the document numbers."""
    along = ("x", "dt", "B", "C", "z")
    out = {k: (v[:, rows] if k in along else v) for k, v in inputs.items() if k not in ("seq_idx", "initial_state")}
    return out if initial_state is None else out | {"initial_state": initial_state}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_equals_the_recurrence(length: int, packed: bool, chunk_size: int) -> None:
    inputs = ssd_inputs(2, length, packed=packed)
    actual, expected = run(inputs, chunk_size), ssd_loop(inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_two_chunk_sizes_agree(length: int) -> None:
    """Also one that divides nothing, and one of a single position."""
    inputs = ssd_inputs(2, length, packed=True)
    expected = run(inputs, chunk_size=256)
    expected_grads = gradients(expected, inputs)
    for chunk_size in (1, 7, 64):
        actual = run(inputs, chunk_size)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
        assert_all_close(gradients(actual, inputs), expected_grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_selective_scan_where_a_is_one_number_for_each_head(packed: bool) -> None:
    """Mamba-1 with the same Δ and A in all channels and states of a head is Mamba-2 (arXiv 2405.21060, section 7)."""
    inputs = ssd_inputs(2, 65, groups=1, packed=packed)
    heads, head_dim, states = inputs["x"].shape[2], inputs["x"].shape[3], inputs["B"].shape[3]
    shared = {"seq_idx": inputs["seq_idx"]} if packed else {}
    y, end = selective_scan(
        x=inputs["x"].flatten(2),
        dt=inputs["dt"].repeat_interleave(head_dim, dim=2),
        A=inputs["A"].repeat_interleave(head_dim)[:, None].expand(-1, states),
        B=inputs["B"][:, :, 0],
        C=inputs["C"][:, :, 0],
        D=inputs["D"].repeat_interleave(head_dim),
        z=inputs["z"].flatten(2),
        dt_bias=inputs["dt_bias"].repeat_interleave(head_dim),
        initial_state=inputs["initial_state"].flatten(1, 2),
        return_final_state=True,
        **shared,
    )
    expected = y.unflatten(2, (heads, head_dim)), end.unflatten(1, (heads, head_dim))
    actual = run(inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state", "all"])
def test_options_may_be_absent(absent: str) -> None:
    inputs = ssd_inputs(2, 9, wide_skip=True)
    for name in ("D", "z", "dt_bias", "initial_state") if absent == "all" else (absent,):
        del inputs[name]
    for softplus in (True, False):
        actual, expected = run(inputs, 4, dt_softplus=softplus), ssd_loop(inputs, dt_softplus=softplus)
        torch.testing.assert_close(actual, expected)
        assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("softplus", [True, False])
def test_dt_is_clamped_and_a_clamped_dt_has_no_gradient(softplus: bool) -> None:
    inputs = ssd_inputs(2, 20)
    options = {"dt_softplus": softplus, "dt_limit": (0.2, 0.7)}
    actual, expected = run(inputs, 8, **options), ssd_loop(inputs, **options)
    torch.testing.assert_close(actual, expected)
    found = gradients(actual, inputs)
    assert_all_close(found, gradients(expected, inputs), rtol=1e-9, atol=1e-10)
    assert (found["dt"] == 0).any()
    assert (found["dt"] != 0).any()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(groups: int) -> None:
    inputs = ssd_inputs(1, 7, heads=4, head_dim=2, groups=groups, states=2, packed=True)
    names = [name for name in inputs if name != "seq_idx"]

    def function(*values: torch.Tensor):  # type: ignore[no-untyped-def]
        return run({**dict(zip(names, values, strict=True)), "seq_idx": inputs["seq_idx"]}, chunk_size=3)

    assert gradcheck(function, floating(inputs), fast_mode=False)


def test_only_some_inputs_and_outputs_take_part() -> None:
    inputs = {name: value.detach() for name, value in ssd_inputs(2, 20).items()}
    inputs["dt"].requires_grad_()
    for index in (0, 1):
        actual, expected = run(inputs)[index], ssd_loop(inputs)[index]
        assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), chunk_size=st.integers(1, 40), state=st.booleans())
def test_packed_equals_separate(lengths: list[int], chunk_size: int, state: bool) -> None:
    total = sum(lengths)
    inputs = ssd_inputs(2, total)
    if not state:
        del inputs["initial_state"]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)
    packed = run(inputs | {"seq_idx": numbers.expand(2, total)}, chunk_size)

    ys, begin = [], 0
    for length in lengths:
        y, end = run(part(inputs, slice(begin, begin + length), inputs.get("initial_state") if begin == 0 else None))
        ys.append(y)
        begin += length
    separate = (torch.cat(ys, dim=1), end)
    torch.testing.assert_close(packed, separate)
    assert_all_close(gradients(packed, inputs), gradients(separate, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
def test_state_connects_two_halves(length: int) -> None:
    inputs = ssd_inputs(2, length + 5)
    whole = run(inputs)
    first, state = run(part(inputs, slice(0, length), inputs["initial_state"]))
    second, end = run(part(inputs, slice(length, None), state))
    halves = (torch.cat([first, second], dim=1), end)
    torch.testing.assert_close(halves, whole)
    assert_all_close(gradients(halves, inputs), gradients(whole, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bare", [False, True])
def test_steps_equal_forward(length: int, bare: bool) -> None:
    inputs = {name: value.detach() for name, value in ssd_inputs(2, length).items()}
    state = inputs["initial_state"]
    if bare:
        inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
        state = torch.zeros_like(state)
    options = {"dt_softplus": not bare, "dt_limit": (0.1, 1.0)}
    y, end = run(inputs, **options)
    rows = []
    for t in range(length):
        now = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items() if k != "initial_state"}
        row, state = ssd_step(state, **now, **options)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, dim=1), y)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """A, D, dt_bias and the state stay fp32; the rest and the result have the dtype of the activations."""
    wide = ("A", "D", "dt_bias", "initial_state")
    exact = {k: v.detach() for k, v in ssd_inputs(2, 65, packed=True).items()}
    inputs = {k: v if k == "seq_idx" else v.to(torch.float32 if k in wide else dtype) for k, v in exact.items()}
    inputs = {k: v.requires_grad_(k != "seq_idx") for k, v in inputs.items()}
    rounded = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual, expected = run(inputs), ssd_loop(rounded)
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
    inputs = ssd_inputs(2, 17)
    flat = [inputs[k].flatten(2) for k in ("x", "z", "B", "C", "dt")]
    fused = torch.cat(flat, dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    x, z, B, C, dt = fused.split([v.shape[2] for v in flat], dim=2)
    x, z, B, C = (v.unflatten(2, inputs[k].shape[2:]) for k, v in {"x": x, "z": z, "B": B, "C": C}.items())
    strided = inputs | {"x": x, "dt": dt, "z": z, "B": B, "C": C}
    assert not x.is_contiguous()
    torch.testing.assert_close(run(strided), run(inputs))
    assert_all_close(gradients(run(strided), inputs), gradients(run(inputs), inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 30.0, 1e3, 1e30])
def test_extreme_decays(scale: float) -> None:
    """exp(Δ·A) from 1 to an underflow: no NaN, and the values of the recurrence."""
    exact = {k: v.detach() for k, v in ssd_inputs(2, 40, packed=True).items()}
    exact["A"] = exact["A"] * scale
    inputs = {k: v if k == "seq_idx" else v.float().requires_grad_() for k, v in exact.items()}
    exact = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual, expected = run(inputs), ssd_loop(exact)
    found, wanted = gradients(actual, inputs), gradients(expected, exact)
    for a, e in [*zip(actual, expected, strict=True), *((found[n], wanted[n]) for n in found)]:
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.detach().abs().max()) + 1e-38)


def test_a_strong_decay_does_not_blur_the_weak_ones_after_it() -> None:
    """A thousand e-foldings at one position, then slow decay: differences of fp32 sums would be off by 1e-4."""
    exact = {k: v.detach() for k, v in ssd_inputs(1, 64).items() if k in ("x", "dt", "A", "B", "C")}
    exact["dt"] = torch.full_like(exact["dt"], 1e-3)
    exact["dt"][:, 5] = 1e5
    exact["A"] = torch.full_like(exact["A"], -1.0)
    inputs = {k: v.float().requires_grad_() for k, v in exact.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual, expected = run(inputs, 64, dt_softplus=False)[0], ssd_loop(exact, dt_softplus=False)[0]
    later = slice(6, None)
    torch.testing.assert_close(actual[:, later].double(), expected[:, later], rtol=1e-5, atol=0.1)
    x_grad, expected_grad = (
        gradients((y[:, later],), i)["x"][:, later] for y, i in ((actual, inputs), (expected, exact))
    )
    torch.testing.assert_close(x_grad.double(), expected_grad, rtol=1e-5, atol=1e-7)


def test_backward_is_deterministic() -> None:
    inputs = ssd_inputs(3, 130, packed=True, dtype=torch.float32)
    first, second = (gradients(run(inputs), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_operator_receives_the_parameters_uncast() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.mamba_train.ssd.default:
                seen.extend([args[2], args[5], args[7]])
            return func(*args, **(kwargs or {}))

    inputs = {name: value.detach() for name, value in ssd_inputs(2, 5, dtype=torch.bfloat16).items()}
    inputs |= {name: inputs[name].float() for name in ("A", "dt_bias")}
    with Record():
        run(inputs)
    assert [t.dtype for t in seen] == [torch.float32, torch.bfloat16, torch.float32]
    assert seen[0].data_ptr() == inputs["A"].data_ptr()


def test_only_one_chunk_of_products_exists() -> None:
    """No tensor is as large as (batch, head, length, length) or (batch, length, head, head_dim, state)."""
    inputs = {k: v.detach() for k, v in ssd_inputs(2, 512, 4, 8, 1, 64, dtype=torch.float32).items()}
    inputs.pop("initial_state")

    def forward_and_backward() -> None:
        arguments = (*inputs.values(), True, 0.0, float("inf"), 32, None)
        y, end, starts, ungated = reference.ssd_op._init_fn(*arguments, None, True, True)
        reference.ssd_backward_op._init_fn(y, end, *arguments, starts, ungated, True)

    assert largest_tensor_in(forward_and_backward) <= 2 * 512 * 4 * 64


def test_nothing_is_saved_without_gradients() -> None:
    inputs = ssd_inputs(2, 65, dtype=torch.float32)
    arguments = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    _, _, starts, ungated = torch.ops.mamba_train.ssd(*arguments, True, 0.0, float("inf"), 16, None, None, False, True)
    assert starts.numel() == ungated.numel() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    inputs = ssd_inputs(2, 33, packed=packed)
    arguments = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    torch.library.opcheck(
        torch.ops.mamba_train.ssd.default,
        (*arguments, True, 0.0, float("inf"), 16, inputs.get("seq_idx"), inputs["initial_state"], True, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = ssd_inputs(2, 33, packed=True)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    actual, expected = compiled(inputs), run(inputs)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 5, 3)),
        ("x", (2, 0, 4, 3)),
        ("x", (0, 5, 4, 3)),
        ("B", (2, 5, 2, 0)),
        ("dt", (2, 5, 3)),
        ("A", (4, 1)),
        ("B", (2, 5, 3, 5)),
        ("C", (2, 5, 1, 5)),
        ("D", (3,)),
        ("D", (4, 4)),
        ("z", (2, 5, 4, 4)),
        ("dt_bias", (3,)),
        ("initial_state", (2, 4, 5, 3)),
        ("seq_idx", (2, 4)),
    ],
)
def test_errors_name_the_argument_and_its_shape(name: str, shape: tuple[int, ...]) -> None:
    inputs = ssd_inputs(2, 5, packed=True)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=rf"ssd: {name} .*{str(shape)[1:-1]}.*expected"):
        run(inputs)


def test_other_errors() -> None:
    inputs = ssd_inputs(2, 5)
    with pytest.raises(ValueError, match=r"ssd: chunk_size is 0, expected at least 1"):
        run(inputs, chunk_size=0)
    with pytest.raises(ValueError, match=r"ssd: dt_limit is \(1.0, 0.5\)"):
        run(inputs, dt_limit=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"A has dtype torch.complex64"):
        run(inputs | {"A": torch.zeros(4, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"B of shape .* is on meta, expected cpu"):
        run(inputs | {"B": torch.zeros(2, 5, 2, 5, device="meta")})
    now = (torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(4), *(torch.zeros(2, 2, 5),) * 2)
    with pytest.raises(ValueError, match=r"ssd_step: state has shape \(2, 4, 5, 3\)"):
        ssd_step(torch.zeros(2, 4, 5, 3), *now)


@pytest.mark.parametrize("programs", [1, 11, 131, 140, 256, 4096])
@pytest.mark.parametrize("heads", [1, 7, 46, 80])
def test_the_backward_divides_heads_so_that_few_processors_idle(programs: int, heads: int) -> None:
    parts = backward_plan._parts(programs, heads, 132)
    part_heads = -(-heads // parts)
    assert (parts - 1) * part_heads < heads, "a part without heads"
    waves = -(-programs * parts // 132)
    undivided = -(-programs // 132) * heads
    assert waves * part_heads <= undivided
    if programs in (11, 140) and heads > 40:
        assert waves * part_heads < 0.8 * undivided
