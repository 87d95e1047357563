"""The decode steps of scan, SSD and convolution on a GPU: against fp64, and against the operators on sequences."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.dispatch import triton_unsupported
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.ssd import ssd_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN: an output that no one writes is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic algorithms without it
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


def scan_inputs(batch: int, channels: int, states: int, dtype: torch.dtype, strided: bool = False) -> Inputs:
    def activation(width: int) -> Tensor:
        whole = torch.randn(batch, width + (13 if strided else 0), device="cuda").to(dtype)
        return whole[:, 5 : 5 + width] if strided else whole

    return {
        "state": torch.randn(batch, channels, states, device="cuda"),
        "x": activation(channels),
        "dt": activation(channels),
        "A": -4 * torch.rand(channels, states, device="cuda"),
        "B": activation(states),
        "C": activation(states),
        "D": torch.randn(channels, device="cuda"),
        "z": activation(channels),
        "dt_bias": torch.randn(channels, device="cuda") - 4,
    }


def ssd_inputs(
    batch: int, heads: int, head_dim: int, states: int, groups: int, dtype: torch.dtype, strided: bool = False
) -> Inputs:
    def activation(*shape: int) -> Tensor:
        wide = torch.randn(batch, *shape[:-1], shape[-1] + (13 if strided else 0), device="cuda").to(dtype)
        return wide[..., 5 : 5 + shape[-1]] if strided else wide

    return {
        "state": torch.randn(batch, heads, head_dim, states, device="cuda"),
        "x": activation(heads, head_dim),
        "dt": activation(heads),
        "A": -4 * torch.rand(heads, device="cuda"),
        "B": activation(groups, states),
        "C": activation(groups, states),
        "D": torch.randn(heads, head_dim, device="cuda") if strided else torch.randn(heads, device="cuda"),
        "z": activation(heads, head_dim),
        "dt_bias": torch.randn(heads, device="cuda") - 4,
    }


def conv_inputs(batch: int, channels: int, width: int, dtype: torch.dtype, strided: bool = False) -> Inputs:
    x = torch.randn(batch, channels * (2 if strided else 1), device="cuda").to(dtype)[:, :channels]
    return {
        "state": torch.randn(batch, width - 1, channels, device="cuda").to(dtype),
        "x": x,
        "weight": torch.randn(channels, width, device="cuda"),
        "bias": torch.randn(channels, device="cuda"),
    }


def check(step, inputs: Inputs, **options) -> None:  # type: ignore[no-untyped-def]
    assert triton_unsupported(inputs["x"]) is None, "the Triton kernels did not run"
    before = {name: value.clone() for name, value in inputs.items()}
    found, again = step(**inputs, **options), step(**inputs, **options)
    wanted = step(**{name: value.double() for name, value in inputs.items()}, **options)
    for name, actual, repeated, expected in zip(("y", "state"), found, again, wanted, strict=True):
        assert torch.equal(actual, repeated), f"{name} differs between two runs"
        assert actual.dtype == inputs["x" if name == "y" else "state"].dtype
        assert actual.shape == expected.shape
        if expected.numel():
            tolerance = ROUNDING[actual.dtype] * (1 if actual.numel() > 4096 else 2)
            error = float((actual.double() - expected).norm() / expected.norm())
            assert error < tolerance, f"{name}: relative error {error:.1e}"
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed"
    if inputs["state"].is_contiguous():
        y, state = step(**inputs, **options, in_place=True)
        assert state is inputs["state"]
        assert torch.equal(y, found[0])
        assert torch.equal(state, found[1])


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("states", [1, 3, 16, 100, 256])
@pytest.mark.parametrize("strided", [False, True])
def test_scan_states(states: int, dtype: torch.dtype, strided: bool) -> None:
    check(selective_scan_step, scan_inputs(3, 200, states, dtype, strided))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("heads", "head_dim", "states", "groups"), [(1, 1, 1, 1), (24, 64, 128, 1), (6, 40, 3, 3), (8, 128, 256, 2)]
)
@pytest.mark.parametrize("strided", [False, True])
def test_ssd_shapes(heads: int, head_dim: int, states: int, groups: int, dtype: torch.dtype, strided: bool) -> None:
    check(ssd_step, ssd_inputs(3, heads, head_dim, states, groups, dtype, strided))


@pytest.mark.parametrize("without", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_ssd_options(without: tuple[str, ...]) -> None:
    inputs = ssd_inputs(64, 64, 64, 128, 1, torch.float32)
    check(ssd_step, {name: value for name, value in inputs.items() if name not in without})
    check(ssd_step, inputs, dt_limit=(0.01, 0.02))
    inputs["A"] = inputs["A"].abs().log()
    check(ssd_step, inputs, A_is_log=True)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("channels", [1, 50, 1536, 5120])
def test_sizes(batch: int, channels: int) -> None:
    check(selective_scan_step, scan_inputs(batch, channels, 16, torch.bfloat16))
    check(causal_conv1d_step, conv_inputs(batch, channels, 4, torch.bfloat16), activation="silu")


@pytest.mark.parametrize("without", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_scan_options(without: tuple[str, ...]) -> None:
    inputs = scan_inputs(2, 100, 16, torch.float32)
    check(selective_scan_step, {name: value for name, value in inputs.items() if name not in without})
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    check(selective_scan_step, inputs, dt_softplus=False)
    inputs["A"] = inputs["A"].abs().log()
    check(selective_scan_step, inputs, A_is_log=True)


def test_small_steps_keep_their_relative_accuracy() -> None:
    inputs = scan_inputs(2, 64, 16, torch.float32)
    inputs["state"].zero_()
    inputs["dt_bias"] = torch.linspace(-18, 25, 64, device="cuda")
    _, found = selective_scan_step(**inputs)  # type: ignore[arg-type]
    _, wanted = selective_scan_step(**{name: value.double() for name, value in inputs.items()})  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), wanted, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("width", [1, 2, 3, 4, 9, 17])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv(width: int, dtype: torch.dtype, activation: str | None) -> None:
    check(causal_conv1d_step, conv_inputs(3, 300, width, dtype, strided=True), activation=activation)


def test_steps_equal_the_operators_on_the_sequence() -> None:
    length, channels = 40, 96
    x, dt, z = (torch.randn(2, length, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    B, C = (torch.randn(2, length, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs, conv = scan_inputs(2, channels, 16, torch.bfloat16), conv_inputs(2, channels, 4, torch.bfloat16)
    A, D, dt_bias, weight, bias = *(inputs[name] for name in ("A", "D", "dt_bias")), conv["weight"], conv["bias"]
    mixed, conv_end = causal_conv1d(
        x, weight, bias, activation="silu", initial_state=conv["state"], return_final_state=True
    )
    expected, scan_end = selective_scan(
        mixed, dt, A, B, C, D, z, dt_bias, initial_state=inputs["state"], return_final_state=True
    )
    conv_state, scan_state, ys = conv["state"], inputs["state"], []
    for t in range(length):
        value, conv_state = causal_conv1d_step(conv_state, x[:, t], weight, bias, activation="silu")
        y, scan_state = selective_scan_step(scan_state, value, dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias)
        ys.append(y)
    assert torch.equal(conv_state, conv_end)
    torch.testing.assert_close(scan_state, scan_end, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(torch.stack(ys, 1), expected, rtol=3e-2, atol=3e-2)


def test_gradients_by_the_plain_steps() -> None:
    inputs = {name: value.requires_grad_() for name, value in scan_inputs(2, 10, 4, torch.float32).items()}
    with torch.enable_grad():
        y, state = selective_scan_step(**inputs)  # type: ignore[arg-type]
        grads = torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_compile_breaks_no_graph() -> None:
    scan, conv = scan_inputs(2, 100, 16, torch.bfloat16), conv_inputs(2, 100, 4, torch.bfloat16)

    def both(scan: Inputs, conv: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        value, conv_state = causal_conv1d_step(**conv, activation="silu")  # type: ignore[arg-type]
        y, scan_state = selective_scan_step(**(scan | {"x": value}))  # type: ignore[arg-type]
        return y, conv_state, scan_state

    for a, b in zip(torch.compile(both, fullgraph=True)(scan, conv), both(scan, conv), strict=True):
        torch.testing.assert_close(a, b)


def test_capture_in_a_cuda_graph() -> None:
    scan = scan_inputs(2, 100, 16, torch.bfloat16)
    selective_scan_step(**scan)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = selective_scan_step(**scan)  # type: ignore[arg-type]
    scan["x"].copy_(torch.randn_like(scan["x"]))
    graph.replay()
    for actual, expected in zip(found, selective_scan_step(**scan), strict=True):  # type: ignore[arg-type]
        assert torch.equal(actual, expected)


@pytest.mark.large_memory(40)
def test_a_state_of_more_than_2_to_the_31_elements() -> None:
    torch.use_deterministic_algorithms(False)
    inputs = scan_inputs(520, 16384, 256, torch.bfloat16)
    assert inputs["state"].numel() > 2**31
    y, state = selective_scan_step(**inputs)  # type: ignore[arg-type]
    last = {k: v if k in ("A", "D", "dt_bias") else v[-1:].clone() for k, v in inputs.items()}
    y_last, state_last = selective_scan_step(**last)  # type: ignore[arg-type]
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(state[-1:], state_last)
