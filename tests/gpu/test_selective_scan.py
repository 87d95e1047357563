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
from kernels.selective_scan.cuda import scan, variants

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
