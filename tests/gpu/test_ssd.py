"""The Triton SSD against the fp64 reference: every dtype, size, option and layout."""

import logging

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.selective_scan import selective_scan
from kernels.ssd import launch, ssd
from tests.gpu.errors import DTYPES, ROUNDING, Inputs, assert_accurate, assert_no_worse, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]


def make_inputs(
    batch: int,
    length: int,
    heads: int = 4,
    head_dim: int = 64,
    groups: int = 1,
    states: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    without: tuple[str, ...] = (),
    packed: bool = False,
    strided: bool = False,
    wide_skip: bool = False,
) -> Inputs:
    def activation(*width: int) -> Tensor:
        # A strided input is a slice of a wider one at an odd offset, as a view of a projection's output may be.
        size = torch.Size(width).numel()
        whole = torch.randn(batch, length, size + (13 if strided else 0), device="cuda", dtype=dtype)
        return (whole[..., 5 : 5 + size] if strided else whole).unflatten(2, width)

    inputs = {
        "x": activation(heads, head_dim),
        "dt": activation(heads),
        "A": -4 * torch.rand(heads, device="cuda") - 0.05,
        "B": activation(groups, states),
        "C": activation(groups, states),
        "D": torch.randn((heads, head_dim) if wide_skip else (heads,), device="cuda"),
        "dt_bias": torch.randn(heads, device="cuda") - 2,
    }
    if "z" not in without:
        inputs["z"] = activation(heads, head_dim)
    if "initial_state" not in without:
        inputs["initial_state"] = torch.randn(batch, heads, head_dim, states, device="cuda")
    inputs = {name: value.requires_grad_() for name, value in inputs.items() if name not in without}
    if packed:
        inputs["seq_idx"] = (torch.rand(batch, length, device="cuda") < 0.03).cumsum(1).remainder(3).int()
    return inputs


def run(inputs: Inputs, grads: tuple[Tensor, Tensor], **options: object) -> Inputs:
    """Outputs and gradients; in the dtype of the inputs, so that fp64 is computed by the reference."""
    y, state = ssd(**inputs, return_final_state=True, **options)  # type: ignore[arg-type,call-overload]
    names = [name for name, value in inputs.items() if value.requires_grad]
    found = torch.autograd.grad(
        [y, state], [inputs[name] for name in names], [grads[0].to(y.dtype), grads[1].to(state.dtype)]
    )
    return {"y": y.detach(), "state": state.detach()} | {f"d{n}": v for n, v in zip(names, found, strict=True)}


def draw_grads(inputs: Inputs) -> tuple[Tensor, Tensor]:
    (batch, _, heads, head_dim), states = inputs["x"].shape, inputs["B"].shape[3]
    state = torch.randn(batch, heads, head_dim, states, device="cuda")
    return torch.randn_like(inputs["x"]), state


def in_fp64(inputs: Inputs) -> Inputs:
    return {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}


def check(inputs: Inputs, roundings: float = 2.0, **options: object) -> None:
    """Values are rounded before each of several products on the way to a result, not only at its end."""
    assert launch.unsupported(inputs["x"], 0.0) is None, "the Triton kernels did not run"
    grads = draw_grads(inputs)
    first, again, exact = (run(i, grads, **options) for i in (inputs, inputs, in_fp64(inputs)))
    # A sum over batch and time of terms of both signs, which may cancel to almost nothing; their roundings remain.
    # What the sum usually has, in norms of what has terms of that size:
    for name, terms, share in (("ddt_bias", "ddt", 1.0), ("dA", "ddt", 1.0), ("dD", "dx", 0.25)):
        scale = share * exact[terms].norm()
        if name in first and first[name].norm() < scale:
            assert torch.equal(first[name], again[name])
            error = (first[name].double() - exact[name]).norm() / scale
            assert error < 2 * ROUNDING[inputs["x"].dtype], f"{name}: {error:.1e}"
            del first[name]
    assert_accurate(first, again, exact, roundings, inputs["x"].dtype)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_lengths(length: int, packed: bool) -> None:
    check(make_inputs(2, length, packed=packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "sizes",
    [
        *((32, 16), (64, 64), (64, 128), (128, 128), (48, 20), (96, 100)),
        *((16, 16), (16, 128), (32, 128), (128, 16), (128, 64)),
        *((32, 256), (64, 256), (128, 256), (96, 200), (64, 129)),
    ],
    ids=str,
)
def test_sizes(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    head_dim, states = sizes
    check(make_inputs(2, 150, 4, head_dim, 2, states, dtype, packed=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("wide_skip", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_layouts(dtype: torch.dtype, wide_skip: bool, strided: bool) -> None:
    check(make_inputs(3, 150, 6, 64, 3, 32, dtype, packed=True, strided=strided, wide_skip=wide_skip))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "without", [("D",), ("z",), ("dt_bias", "initial_state"), ("D", "z", "initial_state")], ids=str
)
def test_options(dtype: torch.dtype, without: tuple[str, ...]) -> None:
    inputs = make_inputs(2, 200, dtype=dtype, without=without)
    check(inputs)
    check(inputs, dt_limit=(0.1, 0.4))


def test_many_heads_and_groups() -> None:
    check(make_inputs(2, 500, 24, 64, 8, 64, packed=True))
    check(make_inputs(1, 130, 7, 64, 7, 128))


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e3, 1e30])
def test_extreme_decays(scale: float) -> None:
    inputs = make_inputs(2, 150, dtype=torch.float32, packed=True)
    inputs["A"] = (inputs["A"].detach() * scale).requires_grad_()
    check(inputs, roundings=8)


def test_a_strong_decay_does_not_blur_the_weak_ones_after_it() -> None:
    inputs = {k: v.detach() for k, v in make_inputs(1, 128, dtype=torch.float32).items()}
    inputs = {k: v for k, v in inputs.items() if k in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = torch.full_like(inputs["dt"], 1e-3)
    inputs["dt"][:, 5] = 1e5
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    exact = {k: v.double() for k, v in inputs.items()}
    found, expected = (ssd(**i, dt_softplus=False)[:, 6:] for i in (inputs, exact))  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["dt", "dt_bias", "A"])
def test_nan_in_a_decay_is_not_lost(name: str) -> None:
    """A step whose loss is NaN is skipped; one that looks finite would be applied."""
    inputs = {k: v.detach() for k, v in make_inputs(2, 150).items()}
    (inputs["dt"][1, 70] if name == "dt" else inputs[name])[1] = float("nan")
    y, state = ssd(**inputs, return_final_state=True)  # type: ignore[arg-type]
    assert y[1, 70:, 1].isnan().all()
    assert state[1, 1].isnan().all()
    assert y[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_packed_equals_separate(dtype: torch.dtype) -> None:
    """The documents lie elsewhere in the chunks when they are alone, so sums are rounded otherwise."""
    lengths = [1, 70, 64, 3, 130, 200]
    inputs = make_inputs(2, sum(lengths), dtype=dtype, without=("initial_state",))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().cuda()
    grads = draw_grads(inputs)
    packed = run(inputs | {"seq_idx": numbers.expand(2, -1)}, grads)
    along = ("x", "dt", "B", "C", "z")
    begin = 0
    total: Inputs = {}
    for length in lengths:
        here = slice(begin, begin + length)
        part = {k: (v[:, here] if k in along else v).detach().requires_grad_() for k, v in inputs.items()}
        last = begin + length == sum(lengths)
        found = run(part, (grads[0][:, here], grads[1] if last else torch.zeros_like(grads[1])))
        for name, value in found.items():
            if name == "y" or name[1:] in along or (name == "state" and last):
                expected = packed[name] if name == "state" else packed[name][:, here]
                error = (expected.double() - value.double()).norm() / value.double().norm()
                assert error < (1e-5 if dtype == torch.float32 else 8e-3), f"{name}: {error:.1e}"
            elif name != "state":
                total[name] = total.get(name, torch.zeros_like(value)) + value
        begin += length
    for name, value in total.items():
        error = (packed[name] - value).norm() / value.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{name}: {error:.1e}"


@pytest.mark.parametrize("chunk", [16, 32])
def test_does_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 300, dtype=torch.float32, packed=True)
    grads = draw_grads(inputs)
    usual = run(inputs, grads)
    for table in ("FORWARD", "STATES", "GRADIENTS"):
        monkeypatch.setattr(launch, table, getattr(launch, table)._replace(chunk=chunk))
    monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 16)
    monkeypatch.setattr(launch, "MIN_SEGMENT_CHUNKS", 2)
    for name, value in run(inputs, grads).items():
        error = (value - usual[name]).norm() / usual[name].norm()
        assert error < 5e-6, f"{name}: {error:.1e}"


def test_equals_the_selective_scan_where_a_is_one_number_for_each_head() -> None:
    """Mamba-1 with the same Δ and A in all channels and states of a head is Mamba-2 (arXiv 2405.21060, section 7)."""
    inputs = make_inputs(2, 300, dtype=torch.float32, packed=True, states=16)
    head_dim, states = inputs["x"].shape[3], inputs["B"].shape[3]
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
        seq_idx=inputs["seq_idx"],
        return_final_state=True,
    )
    expected = y.unflatten(2, (-1, head_dim)), end.unflatten(1, (-1, head_dim))
    found = ssd(**inputs, return_final_state=True)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() / b.norm() < 5e-6


def test_state_connects_two_halves() -> None:
    inputs = {k: v.detach() for k, v in make_inputs(2, 300).items()}
    along = ("x", "dt", "B", "C", "z")
    whole, end = ssd(**inputs, return_final_state=True)  # type: ignore[arg-type]
    first = {k: v[:, :100] if k in along else v for k, v in inputs.items()}
    second = {k: v[:, 100:] if k in along else v for k, v in inputs.items()}
    y1, state = ssd(**first, return_final_state=True)  # type: ignore[arg-type]
    y2, found = ssd(**(second | {"initial_state": state}), return_final_state=True)  # type: ignore[arg-type]
    y = torch.cat([y1, y2], dim=1).double()
    assert (y - whole.double()).norm() / whole.double().norm() < 6e-3
    assert (found - end).norm() / end.norm() < 6e-3


def test_gradient_of_the_state_alone() -> None:
    inputs = make_inputs(2, 90, dtype=torch.float32, packed=True, without=("z", "D"))
    grads = []
    for values in (inputs, in_fp64(inputs)):
        _, state = ssd(**values, return_final_state=True)  # type: ignore[arg-type]
        grads.append(torch.autograd.grad(state.sum(), [values["x"], values["initial_state"], values["dt"]]))
    for found, wanted in zip(*grads, strict=True):
        assert (found.double() - wanted).norm() < 5e-6 * wanted.norm() + 1e-12


def test_views_of_projections_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cut into segments, so few heads would also need the states at which they begin.
    monkeypatch.setattr(launch, "MIN_SEGMENT_CHUNKS", 4096)
    heads, head_dim, states = 8, 64, 128
    whole = torch.randn(2, 4096, heads * head_dim + 2 * states + heads, device="cuda", dtype=torch.bfloat16)
    x, B, C, dt = whole.split([heads * head_dim, states, states, heads], dim=-1)
    inputs = make_inputs(2, 4096, heads, without=("initial_state", "z"))
    inputs |= {"x": x.unflatten(2, (heads, head_dim)), "B": B.unsqueeze(2), "C": C.unsqueeze(2), "dt": dt}
    check({k: v.detach().requires_grad_() for k, v in inputs.items()})
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        y = ssd(**inputs)  # type: ignore[arg-type]
    assert torch.cuda.max_memory_allocated() - before < 1.5 * y.nbytes


def test_compile_breaks_no_graph() -> None:
    inputs = make_inputs(2, 140)

    def loss(values: Inputs) -> Tensor:
        y, state = ssd(**values, return_final_state=True)  # type: ignore[arg-type]
        return y.float().square().sum() + state.float().sum()

    expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), list(inputs.values()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() / b.norm() < 2e-2


def test_reference_runs_what_the_kernels_cannot(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            inputs = make_inputs(2, 40, head_dim=160, states=16, dtype=torch.float32)
            grads = draw_grads(inputs)
            found = run(inputs, grads)
    assert_accurate(found, found, run(in_fp64(inputs), grads))
    lines = [record.getMessage() for record in caplog.records if "160 channels" in record.getMessage()]
    assert [line.split()[0] for line in lines] == ["ssd", "ssd_backward"]


@pytest.mark.large_memory(70)
def test_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole equals its parts: one sequence, and few heads, whose offsets fit in 32 bits."""
    batch, length, heads = 2, 2**18 + 17, 88
    torch.use_deterministic_algorithms(False)  # filling outputs of this size takes long
    monkeypatch.setattr(launch, "MIN_SEGMENT_CHUNKS", length)  # few heads would be cut, and rounded otherwise
    inputs = make_inputs(batch, length, heads, without=("initial_state", "z"))
    assert inputs["x"].numel() > 2**31
    grad = torch.randn_like(inputs["x"])
    along = ("x", "dt", "B", "C")

    def results(batches: slice, part: slice) -> Inputs:
        leaves = {k: v[batches] if k in along else v for k, v in inputs.items()}
        leaves = {k: v[:, :, part] if k in ("x", "dt") else v for k, v in leaves.items()}
        leaves = {k: v[part] if k in ("A", "D", "dt_bias") else v for k, v in leaves.items()}
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
        y = ssd(**leaves)  # type: ignore[arg-type]
        found = torch.autograd.grad(y, list(leaves.values()), grad[batches, :, part])
        return {"y": y.detach()} | dict(zip(leaves, found, strict=True))

    whole = results(slice(None), slice(None))
    last = slice(heads - 8, heads)
    part = results(slice(1, 2), last)
    for name in ("y", "x", "dt"):
        assert torch.equal(whole[name][1:, :, last], part[name]), name
    del part
    part = results(slice(1, 2), slice(None))
    for name in ("B", "C"):
        assert torch.equal(whole[name][1:], part[name]), name


@pytest.mark.parametrize("shape", [(2, 77, 4), (2, 1024, 24)], ids=str)
def test_errors_are_those_of_the_official_kernels(shape: tuple[int, int, int]) -> None:
    official = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason="needs mamba_ssm")

    def draw() -> tuple[Inputs, Inputs, Inputs]:
        inputs = make_inputs(*shape, without=("initial_state", "z"))
        grads = draw_grads(inputs)[0], torch.zeros(shape[0], shape[2], 64, 128, device="cuda")
        values = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y = official.mamba_chunk_scan_combined(**values, chunk_size=256, dt_softplus=True)
        found = torch.autograd.grad(y, list(values.values()), grads[0])
        named = {"y": y.detach()} | {f"d{n}": v for n, v in zip(values, found, strict=True)}
        return run(inputs, grads), named, run(in_fp64(inputs), grads)

    assert_no_worse(draw)
