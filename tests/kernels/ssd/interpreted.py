"""SSD's Triton kernels on the CPU, against the reference in fp64; test_triton.py runs this."""

import math
import os

import pytest
import torch
from torch import Tensor

from kernels.ssd import launch, launch_backward, reference, ssd
from kernels.ssd.backward_into import launch_into
from tests.kernels.loops import gradients
from tests.kernels.ssd.loops import ssd_inputs
from tests.kernels.triton_interpreter import drop_nan_as_a_gpu_does

assert os.environ.get("TRITON_INTERPRET") == "1", "the kernels would be compiled, not interpreted"
reference.ssd_op.register_kernel("cpu")(launch.forward)
reference.ssd_backward_op.register_kernel("cpu")(launch_backward.backward)
# Triton's interpreter cuts numbers to bf16 where a GPU rounds them.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
PARAMETERS = ("A", "D", "dt_bias", "initial_state")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks small enough for a few positions to need several."""
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "processors", lambda index: 1)
    monkeypatch.setattr(launch, "has_large_shared_memory", lambda index: True)
    monkeypatch.setattr(launch, "FORWARD", launch.Shape(chunk=16, head_dim=16, states=128, warps=4, stages=1))
    monkeypatch.setattr(launch, "STATES", launch.Shape(chunk=16, head_dim=16, states=16, warps=4, stages=1))
    monkeypatch.setattr(launch, "GRADIENTS", launch.Shape(chunk=16, head_dim=128, states=128, warps=4, stages=1))
    monkeypatch.setattr(launch, "FLOWS", launch.Shape(chunk=32, head_dim=128, states=128, warps=4, stages=1))


def typed(inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs in this dtype (parameters in fp32), and the same numbers in fp64."""
    low = {
        k: v if k == "seq_idx" else v.detach().to(torch.float32 if k in PARAMETERS else dtype).requires_grad_()
        for k, v in inputs.items()
    }
    return low, {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in low.items()}


def exact_results(inputs: dict[str, Tensor], softplus: bool, limit: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The reference, which the kernels stand in for here."""
    arguments = [inputs.get(name) for name in NAMES]
    options = (softplus, *limit, 64, inputs.get("seq_idx"), inputs.get("initial_state"))

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):  # type: ignore[no-untyped-def]
            y, state, *ctx.saved = reference.ssd_op._init_fn(*arguments, *options, True, True)
            return y, state

        @staticmethod
        def backward(ctx, y_grad, state_grad):  # type: ignore[no-untyped-def]
            grads = reference.ssd_backward_op._init_fn(y_grad, state_grad, *arguments, *options[:-1], *ctx.saved, True)
            named = dict(zip((*NAMES, "initial_state"), grads, strict=True))
            return tuple(named[name] for name in inputs if name != "seq_idx")

    return Reference.apply(*(value for name, value in inputs.items() if name != "seq_idx"))


def check(
    inputs: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    low, exact = typed(inputs, dtype)
    actual = ssd(**low, dt_softplus=softplus, dt_limit=limit, return_final_state=True)  # type: ignore[arg-type]
    expected = exact_results(exact, softplus, limit)
    found, wanted = gradients(actual, low), gradients(expected, exact)
    for name, a, e in [
        ("y", actual[0], expected[0]),
        ("state", actual[1], expected[1]),
        *((f"d{name}", found[name], wanted[name]) for name in found),
    ]:
        assert a.shape == e.shape
        assert float((a.double() - e).abs().max()) <= TOLERANCE[dtype] * max(1e-6, float(e.abs().max())), name


@pytest.mark.parametrize(("length", "packed"), [(1, False), (16, False), (17, True), (40, True)])
def test_equals_the_reference(length: int, packed: bool) -> None:
    check(ssd_inputs(2, length, packed=packed))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 3), (3, 24, 3, 16), (4, 32, 1, 40), (6, 16, 2, 16)], ids=str)
def test_heads_groups_and_states(sizes: tuple[int, int, int, int]) -> None:
    heads, head_dim, groups, states = sizes
    check(ssd_inputs(2, 21, heads, head_dim, groups, states, packed=True, wide_skip=True))


@pytest.mark.parametrize(
    ("absent", "softplus"),
    [(("D",), True), (("z",), False), (("dt_bias", "initial_state"), True), (("D", "z", "dt_bias"), False)],
    ids=str,
)
def test_options_may_be_absent(absent: tuple[str, ...], softplus: bool) -> None:
    inputs = {name: value for name, value in ssd_inputs(1, 20, packed=True).items() if name not in absent}
    check(inputs, softplus=softplus, limit=(0.1, 0.6))


@pytest.mark.parametrize("packed", [False, True])
def test_more_states_than_a_tile_holds(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks: three of 16, 16 and 8 states."""
    for table in ("FORWARD", "GRADIENTS"):
        monkeypatch.setattr(launch, table, getattr(launch, table)._replace(states=16))
    inputs = ssd_inputs(2, 37, 4, 24, 2, 40, packed=packed, wide_skip=packed)
    check(inputs)
    check({name: value for name, value in inputs.items() if name not in ("z", "initial_state")}, torch.float16)


@pytest.mark.parametrize("absent", [(), ("z", "initial_state")], ids=str)
def test_decays_are_computed_again_for_other_chunks(absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once where the backward has chunks as long as the forward's, which keeps them."""
    inputs = {name: value for name, value in ssd_inputs(2, 37, packed=True).items() if name not in absent}
    made, usual = [], launch.fill_decays
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "fill_decays", lambda *a: made.append(1) or usual(*a))
    for chunk, times in ((16, 1), (32, 2)):
        made.clear()
        monkeypatch.setattr(launch, "FORWARD", launch.FORWARD._replace(chunk=chunk))
        check(inputs)
        assert len(made) == times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(ssd_inputs(2, 37, 4, 16, 2, 16, packed=True), dtype)


def test_pairs_of_near_positions_are_not_rounded() -> None:
    """In two blocks of two chunks each, the gradient of A of 16-bit activations is that of fp32 ones."""
    given = ssd_inputs(1, 50, 2, 16, 1, 16)
    low, exact = typed({k: v for k, v in given.items() if k in ("x", "dt", "A", "B", "C")}, torch.bfloat16)
    grad = torch.randn(low["x"].shape).bfloat16()
    found = torch.autograd.grad(ssd(**low), low["A"], grad)[0]  # type: ignore[call-overload]
    expected = torch.autograd.grad(exact_results(exact, True, (0.0, math.inf))[0], exact["A"], grad.double())[0]
    assert (found - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e30])
def test_extreme_decays(scale: float) -> None:
    inputs = {k: v.detach() for k, v in ssd_inputs(2, 40, packed=True).items()}
    inputs["A"] = inputs["A"] * scale
    check(inputs)


def test_a_strong_decay_does_not_blur_the_weak_ones_after_it() -> None:
    inputs = {k: v.detach() for k, v in ssd_inputs(1, 32).items() if k in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = torch.full_like(inputs["dt"], 1e-3)
    inputs["dt"][:, 5] = 1e5
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    low, exact = typed(inputs, torch.float32)
    actual = ssd(**low, dt_softplus=False)[:, 6:]  # type: ignore[arg-type]
    expected = exact_results(exact, False, (0.0, math.inf))[0][:, 6:]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0.1)


@pytest.mark.parametrize("name", ["dt", "dt_bias", "A"])
def test_nan_in_a_decay_is_not_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose loss is NaN is skipped; one that looks finite would be applied."""
    drop_nan_as_a_gpu_does(monkeypatch)
    inputs = {k: v.detach() for k, v in ssd_inputs(1, 20, 3, 8, 1, 8).items()}
    (inputs["dt"][0, 5] if name == "dt" else inputs[name])[1] = math.nan
    low, _ = typed(inputs, torch.float32)
    y, state = ssd(**low, return_final_state=True)  # type: ignore[call-overload]
    assert y[0, 5:, 1].isnan().all()
    assert state[0, 1].isnan().all()
    assert y[0, :, ::2].isfinite().all()
    assert gradients((y, state), low)["A"][1].isnan()


@pytest.mark.parametrize("chunk", [32])
def test_does_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    low, _ = typed(ssd_inputs(1, 50, 2, packed=True), torch.float16)
    expected = ssd(**low, return_final_state=True)  # type: ignore[arg-type]
    expected_grads = gradients(expected, low)
    for table in ("FORWARD", "STATES", "GRADIENTS"):
        monkeypatch.setattr(launch, table, getattr(launch, table)._replace(chunk=chunk))
    actual = ssd(**low, return_final_state=True)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=5e-3)
    for name, grad in gradients(actual, low).items():
        assert (grad - expected_grads[name]).norm() <= 3e-3 * expected_grads[name].norm(), name


def test_views_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a projection at odd offsets, batch and length exchanged: the activations are not copied."""
    low, _ = typed(ssd_inputs(2, 17, 3, 8, 1, 8), torch.float32)
    low = {k: v.detach() for k, v in low.items()}
    expected = ssd(**low)  # type: ignore[arg-type]
    flat = [low[k].flatten(2) for k in ("x", "z", "B", "C", "dt")]
    fused = torch.cat([torch.zeros(2, 17, 3), *flat], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    x, z, B, C, dt = fused[..., 3:].split([v.shape[2] for v in flat], dim=2)
    x, z, B, C = (v.unflatten(2, low[k].shape[2:]) for k, v in {"x": x, "z": z, "B": B, "C": C}.items())
    monkeypatch.setattr(
        Tensor, "contiguous", lambda t: pytest.fail("a copy") if t.dim() == 4 and not t.is_contiguous() else t
    )
    assert torch.equal(ssd(**low | {"x": x, "z": z, "B": B, "C": C, "dt": dt}), expected)  # type: ignore[arg-type]


def test_only_the_final_state_takes_part() -> None:
    inputs = {k: v for k, v in ssd_inputs(2, 20, packed=True).items() if k != "z"}
    low, exact = typed(inputs, torch.float32)
    found = gradients((ssd(**low, return_final_state=True)[1],), low)  # type: ignore[arg-type]
    wanted = gradients((exact_results(exact, True, (0.0, math.inf))[1],), exact)
    for name, value in found.items():
        assert (value.double() - wanted[name]).abs().max() <= 4e-6 * wanted[name].abs().max().clamp_min(1), name


def test_states_that_nobody_asks_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other results are the same."""
    monkeypatch.setattr(launch, "FORWARD", launch.FORWARD._replace(states=16))
    inputs = ssd_inputs(2, 37, 2, 16, 1, 40, dtype=torch.float32)
    inputs.pop("initial_state")
    ops, given = (reference.ssd_op, reference.ssd_backward_op), [inputs[name].detach() for name in NAMES]
    options = (True, 0.0, math.inf, 16, None)
    found = [ops[0](*given, *options, None, True, wanted) for wanted in (True, False)]
    y, _, *kept = found[0]
    assert found[1][1].numel() == 0
    assert all(torch.equal(found[0][i], found[1][i]) for i in (0, 2, 3))
    grads = [ops[1](torch.ones_like(y), None, *given, *options, *kept, wanted) for wanted in (True, False)]
    assert grads[1][-1].numel() == 0
    assert all(torch.equal(*pair) for pair in list(zip(*grads, strict=True))[:-1])


def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences: the time is cut, where the parts begin is found first."""
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "processors", lambda index: 16)
    monkeypatch.setattr(launch, "MIN_SEGMENT_CHUNKS", 2)
    cut = []
    usual = launch._segments
    monkeypatch.setattr(launch, "_segments", lambda *sizes: cut.append(usual(*sizes)) or cut[-1])
    check(ssd_inputs(1, 90, 2, 16, 1, 16, packed=False))
    check(ssd_inputs(2, 90, 2, 16, 1, 16, packed=True), torch.float16)
    assert set(cut) == {3}


@pytest.mark.parametrize(("for_backward", "wanted"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("absent", [(), ("z",), ("initial_state",)], ids=str)
def test_fake_promises_what_is_returned(absent: tuple[str, ...], for_backward: bool, wanted: bool) -> None:
    inputs = {k: v.detach().bfloat16() for k, v in ssd_inputs(1, 5, 2, 8, 1, 8).items() if k not in absent}
    arguments = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    state = inputs.get("initial_state")
    found = launch.forward(*arguments, True, 0.0, 1.0, 16, None, state, for_backward, wanted)  # type: ignore[arg-type]
    fake = launch.fake(inputs["x"], inputs["B"], inputs.get("z"), state, for_backward, wanted)
    for actual, promised in zip(found, fake, strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (promised.shape, promised.dtype, promised.stride())


def test_gradients_in_the_memory_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one tensor each; in three blocks of states, each of which reads what the one before must not write."""
    monkeypatch.setattr(launch, "GRADIENTS", launch.GRADIENTS._replace(states=16))
    heads, head_dim, groups, states = 3, 16, 1, 40
    sizes = (heads * head_dim, groups * states, groups * states)
    conv, dt = torch.randn(1, 37, sum(sizes)), torch.randn(1, 37, heads + 5)[..., 3:-2]
    y_grad, parameters = torch.randn(1, 37, heads, head_dim), (torch.randn(heads), torch.randn(heads))

    def run(conv: Tensor, grad: Tensor) -> list[Tensor]:
        (x, B, C), (x_grad, B_grad, C_grad) = (t.split(sizes, dim=2) for t in (conv, grad))
        x, x_grad = (t.unflatten(2, (heads, head_dim)) for t in (x, x_grad))
        B, C, B_grad, C_grad = (t.unflatten(2, (groups, states)) for t in (B, C, B_grad, C_grad))
        dt_grad = torch.empty_like(dt)
        arguments = (x, dt, torch.linspace(-2, -0.1, heads), B, C, *parameters, 16, None, torch.empty(0))
        return [*launch_into(y_grad, *arguments, x_grad, dt_grad, B_grad, C_grad), dt_grad, grad]

    expected = run(conv, torch.empty_like(conv))
    for found, value in zip(run(conv, conv), expected, strict=True):
        assert torch.equal(found, value)
