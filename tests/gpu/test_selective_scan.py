"""The CUDA selective scan against an fp64 recurrence: every dtype, state count, option and layout."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan import selective_scan
from kernels.selective_scan.cuda import device, scan, variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Inputs = dict[str, Tensor]
# Relative error of a result in this dtype: for the short ones, of one rounding. More of a few values, where errors
# don't average out.
ROUNDING = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(params=["wide", "narrow"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of kernels for 16 states, whatever the sizes would choose: two channels per lane, or one."""
    many = {"wide": 10_000, "narrow": 1}[request.param]
    for name in ("forward_variant", "backward_variant"):
        choose = getattr(variants, name)
        monkeypatch.setattr(variants, name, lambda states, *sizes, choose=choose: choose(states, many, 64, 132))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN: an output that no one writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
    packed: bool = False,
    initial: bool = False,
    strided: bool = False,
) -> Inputs:
    def activation(width: int) -> Tensor:
        # A strided input is a slice of a wider one at an odd offset, as a view of a projection's output may be.
        whole = torch.randn(batch, length, width + (13 if strided else 0), device="cuda").to(dtype)
        return (whole[..., 5 : 5 + width] if strided else whole).requires_grad_()

    def parameter(value: Tensor) -> Tensor:
        return value.cuda().requires_grad_()

    inputs = {
        "x": activation(channels),
        "dt": activation(channels),
        "A": parameter(-4 * torch.rand(channels, states) - 0.05),
        "B": activation(states),
        "C": activation(states),
        "D": parameter(torch.randn(channels)),
        "z": activation(channels),
        "dt_bias": parameter(torch.randn(channels) - 2),
    }
    if initial:
        inputs["initial_state"] = parameter(torch.randn(batch, channels, states))
    if packed:
        inputs["seq_idx"] = (torch.rand(batch, length, device="cuda") < 0.07).cumsum(1).int()
    return {name: value for name, value in inputs.items() if name not in without}


def recurrence(inputs: Inputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    x, A, seq_idx = inputs["x"], inputs["A"], inputs.get("seq_idx")
    h = inputs.get("initial_state", x.new_zeros(x.shape[0], *A.shape))
    delta = inputs["dt"] + inputs["dt_bias"] if "dt_bias" in inputs else inputs["dt"]
    delta = F.softplus(delta, threshold=40) if dt_softplus else delta
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        if seq_idx is not None and t > 0:
            decay = decay * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        h = decay * h + (delta[:, t] * x[:, t])[..., None] * inputs["B"][:, t, None]
        ys.append((h * inputs["C"][:, t, None]).sum(-1))
    y = torch.stack(ys, 1)
    if "D" in inputs:
        y = y + inputs["D"] * x
    return (y * F.silu(inputs["z"]) if "z" in inputs else y), h


def run(inputs: Inputs, grads: tuple[Tensor, Tensor], dt_softplus: bool, fp64: bool = False) -> Inputs:
    """Outputs and gradients, by the operator or by the recurrence in fp64."""
    if fp64:
        inputs = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
        y, state = recurrence(inputs, dt_softplus)
    else:
        y, state = selective_scan(**inputs, dt_softplus=dt_softplus, return_final_state=True)  # type: ignore[arg-type]
    names = [name for name, value in inputs.items() if value.requires_grad]
    values = torch.autograd.grad(
        [y, state], [inputs[name] for name in names], [grads[0].to(y.dtype), grads[1].to(state.dtype)]
    )
    return {"y": y, "state": state} | {f"d{name}": value for name, value in zip(names, values, strict=True)}


def check(inputs: Inputs, dt_softplus: bool = True) -> None:
    batch, length, channels = inputs["x"].shape
    dtype = inputs["x"].dtype
    grads = (
        torch.randn(batch, length, channels, device="cuda").to(dtype),
        torch.randn(batch, *inputs["A"].shape, device="cuda"),
    )
    ours, again = run(inputs, grads, dt_softplus), run(inputs, grads, dt_softplus)
    assert scan.unsupported(inputs["x"], inputs["A"].shape[1]) is None, "the CUDA kernels did not run"
    exact = run(inputs, grads, dt_softplus, fp64=True)
    for name, value in ours.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        expected = exact[name]
        assert value.shape == expected.shape
        given = inputs["x" if name == "y" else "A" if name == "state" else name[1:]]
        assert value.dtype == given.dtype
        tolerance = ROUNDING[value.dtype] * (1 if value.numel() > 4096 else 2.5)
        scale = expected.norm()
        if name == "ddt_bias":
            # A sum over batch and time of terms of both signs, which may cancel to almost nothing; the roundings of the
            # terms remain. Those of mamba_ssm do, too.
            scale = torch.maximum(scale, exact["ddt"].norm())
        error = (value.double() - expected).norm() / scale.clamp_min(1e-6)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
        worst = (value.double() - expected).abs().max() / torch.maximum(scale, expected.abs().max()).clamp_min(1e-6)
        assert worst < 20 * tolerance, f"{name}: an element is off by {worst:.1e} of the largest"


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("states", [1, 3, 8, 16, 32, 64, 128, 200, 256])
def test_states(dtype: torch.dtype, states: int) -> None:
    check(make_inputs(2, 50, 24 if states > 64 else 96, states, dtype, packed=True, initial=True))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("channels", [1, 8, 50, 64, 320])
@pytest.mark.usefixtures("shape")
def test_lengths_and_channels(length: int, channels: int) -> None:
    check(make_inputs(2, length, channels, 16, torch.bfloat16, packed=length > 15))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("without", [(), ("z",), ("D", "dt_bias"), ("z", "D", "dt_bias")])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.usefixtures("shape")
def test_options(dtype: torch.dtype, without: tuple[str, ...], packed: bool, strided: bool) -> None:
    inputs = make_inputs(2, 53, 72, 16, dtype, without, packed=packed, initial=packed, strided=strided)
    check(inputs)
    if "dt_bias" in without:
        inputs["dt"] = F.softplus(inputs["dt"].detach()).requires_grad_()
        check(inputs, dt_softplus=False)


def test_views_of_projections_are_not_copied() -> None:
    whole = torch.randn(2, 64, 2 * 128, device="cuda", dtype=torch.bfloat16)
    inputs = make_inputs(2, 64, 128, 16, torch.bfloat16)
    inputs["x"], inputs["z"] = (half.requires_grad_() for half in whole.chunk(2, dim=-1))
    check(inputs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        y, state = selective_scan(**inputs, return_final_state=True)  # type: ignore[arg-type]
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + state.nbytes + inputs["x"].nbytes // 2


def test_mixed_dtypes_are_computed_in_fp32() -> None:
    inputs = make_inputs(2, 20, 32, 16, torch.bfloat16)
    inputs["dt"] = inputs["dt"].detach().float().requires_grad_()
    check(inputs)


def test_every_variant() -> None:
    """Shapes that take each of the kernels with 16 states."""
    for batch, channels in ((1, 64), (4, 5120), (8, 4096), (8, 5120)):
        check(make_inputs(batch, 18, channels, 16, torch.bfloat16, packed=True))


@pytest.mark.parametrize("count", [1, 3])
def test_many_states_and_few_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that takes one group of channels after another adds to its own part of dB and dC."""
    monkeypatch.setattr(variants, "FREE_PARTS_BYTES", 0)
    side_by_side(monkeypatch, count)
    check(make_inputs(2, 50, 200, 64, torch.bfloat16, packed=True, initial=True))


@pytest.mark.parametrize("steps", [16, 48])
def test_segments_of_time(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than places, each cut into segments that wait for one another."""
    monkeypatch.setattr(variants, "SEGMENT_STEPS", steps)
    cut: list[int] = []
    segments = variants.segments

    def recorded(*arguments: int) -> int:
        cut.append(segments(*arguments))
        return cut[-1]

    monkeypatch.setattr(variants, "segments", recorded)
    check(make_inputs(8, 70, 64 * 50, 16, torch.bfloat16, packed=True, initial=True))
    check(make_inputs(8, 70, 32 * 50, 32, torch.bfloat16))
    assert min(cut) > 1


def side_by_side(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As many segments of time side by side, whatever the sizes would choose."""
    monkeypatch.setattr(variants, "_side_by_side", lambda variant, batch, length, *_: min(count, -(-length // 16)))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("states", [1, 8, 16, 64, 200])
def test_segments_side_by_side(dtype: torch.dtype, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side(monkeypatch, 5)
    channels = 24 if states > 64 else 96
    check(make_inputs(2, 131, channels, states, dtype, packed=True, initial=True))
    inputs = make_inputs(2, 97, channels, states, dtype, ("z", "D", "dt_bias"))
    inputs["dt"] = F.softplus(inputs["dt"].detach()).requires_grad_()
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize(("length", "channels"), [(17, 1), (32, 50), (160, 320), (1501, 136)])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_lengths_and_channels_side_by_side(
    length: int, channels: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side_by_side(monkeypatch, count)
    check(make_inputs(2, length, channels, 16, torch.bfloat16, packed=length < 1000, initial=True, strided=count == 3))


def chained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward whose warps take turns in time, whatever the sizes would choose."""
    monkeypatch.setattr(variants, "CHAINED", variants.Chained(0, 10**9, 1))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("without", [(), ("z",), ("z", "D", "dt_bias")])
@pytest.mark.parametrize("strided", [False, True])
def test_chained_options(
    dtype: torch.dtype, without: tuple[str, ...], strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chained(monkeypatch)
    inputs = make_inputs(2, 453, 72, 16, dtype, without, packed=strided, initial=not strided, strided=strided)
    if "dt_bias" in without:
        inputs["dt"] = F.softplus(inputs["dt"].detach()).requires_grad_()
    check(inputs, dt_softplus="dt_bias" not in without)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 127, 128, 130, 1501])
@pytest.mark.parametrize(("channels", "states"), [(1, 16), (50, 9), (320, 16), (4000, 16)])
def test_chained_lengths_and_channels(length: int, channels: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4000 channels blocks share units: each begins where another has left off."""
    chained(monkeypatch)
    if length * channels < 10**6:
        check(make_inputs(2, length, channels, states, torch.bfloat16, packed=length < 1000, initial=True))


def test_chained_results_depend_on_no_one_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many blocks share the chunks changes no bit."""
    chained(monkeypatch)
    inputs = make_inputs(1, 700, 2048, 16, torch.bfloat16, initial=True)
    results = []
    for processors in (1, 3, 7, 100, 132, 1000):
        monkeypatch.setattr(device, "processors", lambda index, count=processors: count)
        with torch.no_grad():
            results.append(selective_scan(**inputs, return_final_state=True))  # type: ignore[arg-type]
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_a_long_sequence_of_few_channels() -> None:
    """The sizes themselves choose segments side by side."""
    assert variants.forward_plan(16, 1, 2050, 200, 132)[1] > 3
    assert variants.backward_plan(16, 1, 2050, 200, 132)[1] > 3
    check(make_inputs(1, 2050, 200, 16, torch.bfloat16, initial=True))


def test_the_number_of_segments_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 400, 72, 16, torch.float32, initial=True)
    grads = torch.randn(2, 400, 72, device="cuda"), torch.randn(2, 72, 16, device="cuda")
    results = []
    for count in (1, 2, 4, 25):
        side_by_side(monkeypatch, count)
        results.append(run(inputs, grads, True))
    for result in results[1:]:
        for name, value in result.items():
            assert (value - results[0][name]).norm() < 1e-5 * results[0][name].norm(), name


def test_gradient_of_the_state_alone() -> None:
    inputs = make_inputs(2, 20, 32, 16, torch.float32)
    _, state = selective_scan(**inputs, return_final_state=True)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(state.sum(), [inputs["x"]])
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    (expected,) = torch.autograd.grad(recurrence(exact, True)[1].sum(), [exact["x"]])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_compile_breaks_no_graph() -> None:
    inputs = make_inputs(2, 40, 64, 16, torch.bfloat16)

    def loss(values: Inputs) -> Tensor:
        return selective_scan(**values).float().square().sum()  # type: ignore[arg-type,union-attr]

    expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), list(inputs.values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_reference_runs_what_the_kernel_cannot() -> None:
    inputs = {k: v.detach().double().requires_grad_() for k, v in make_inputs(1, 9, 8, 16, torch.float32).items()}
    y = selective_scan(**inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(y, recurrence(inputs, True)[0])


@pytest.mark.parametrize("count", [1, 3, "chained"])
def test_more_than_2_to_the_31_elements(count: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole equals its parts, whose offsets fit in 32 bits: rows, batches, saved states, and parts of dB and dC."""
    if isinstance(count, str):
        chained(monkeypatch)
    side_by_side(monkeypatch, 3 if isinstance(count, str) else count)
    batch, length, channels, states, width = 3, 2**18 + 17, 4160, 16, 64
    if torch.cuda.get_device_properties(0).total_memory < 75 * 2**30:
        pytest.skip("needs 75 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)  # filling outputs of this size takes long

    def activation() -> Tensor:
        return torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)

    x, dt, grad = activation(), activation(), activation()
    assert 2 * x.stride(0) > 2**31
    small = make_inputs(batch, length, width, states, torch.bfloat16)
    A = -4 * torch.rand(channels, states, device="cuda") - 0.05

    def grads_of(batches: slice, part: slice) -> tuple[Tensor, ...]:
        inputs = [t[batches, :, part].contiguous().requires_grad_() for t in (x, dt)]
        inputs += [small[name][batches].detach().requires_grad_() for name in ("B", "C")]
        y = selective_scan(*inputs[:2], A[part], *inputs[2:])  # type: ignore[misc]
        y_grad = grad[batches, :, part].contiguous()
        return (y.detach(), *torch.autograd.grad(y, inputs, y_grad))  # type: ignore[arg-type,union-attr]

    everything = slice(None)
    whole = grads_of(everything, everything)
    for start in (0, 2048, channels - width):
        part = slice(start, start + width)
        for a, b in zip(whole[:3], grads_of(everything, part)[:3], strict=True):
            assert torch.equal(a[..., part], b)
    for a, b in zip(whole, grads_of(slice(2, 3), everything), strict=True):
        torch.testing.assert_close(a[2:], b, rtol=2e-2, atol=2e-2)


def test_each_length_is_not_a_graph_of_its_own() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def loss(values: Inputs) -> Tensor:
        return selective_scan(**values).float().square().sum()  # type: ignore[arg-type,union-attr]

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for length in range(64, 224, 16):
        inputs = make_inputs(2, length, 64, 16, torch.bfloat16)
        torch.autograd.grad(compiled(inputs), list(inputs.values()))
    assert counter.frame_count <= 2


SMALL = """
import torch
from tests.gpu.test_selective_scan import make_inputs, scan, selective_scan
from kernels.selective_scan.cuda import variants
variants.segments = lambda *arguments: 2
narrow = variants.forward_variant, variants.backward_variant
wide = tuple(lambda states, *sizes, choose=choose: choose(states, 10_000, 64, 132) for choose in narrow)
in_turn = ((16, 72, narrow, 1), (16, 72, wide, 1), (16, 67, wide, 1), (64, 20, narrow, 1), (256, 5, narrow, 1))
beside = ((16, 72, wide, 3), (16, 67, wide, 3), (64, 20, narrow, 3))
for states, channels, kernels, count in in_turn + beside + ((16, 72, wide, 0), (16, 67, wide, 0)):
    variants.CHAINED = variants.Chained(0 if count == 0 else 10**9, 10**9, 1)
    variants.forward_variant, variants.backward_variant = kernels
    variants._side_by_side = lambda *arguments: max(1, count)
    inputs = make_inputs(2, 51, channels, states, torch.bfloat16, packed=True, initial=True, strided=channels % 8 > 0)
    y, state = selective_scan(**inputs, return_final_state=True)
    torch.autograd.grad(y.float().sum() + state.sum(), [v for v in inputs.values() if v.requires_grad])
torch.cuda.synchronize()
assert scan.unsupported(inputs["x"], 16) is None
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, repository: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "3", "--kernel-regex", "kns=scan_"]
    if tool == "memcheck":
        # cuda-bindings asks the driver for functions that it may lack (cuGetProcAddress), and copes with the answer.
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-c", SMALL]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
