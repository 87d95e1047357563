"""The Triton convolution against the fp64 reference: every dtype, width, option and layout."""

import logging

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d, launch
from tests.gpu.errors import DTYPES, Inputs, assert_accurate, assert_no_worse, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    dtype: torch.dtype,
    width: int = 4,
    without: tuple[str, ...] = (),
    packed: bool = False,
    strided: bool = False,
) -> Inputs:
    # A strided input is a slice of a wider one at an odd offset, as a view of a projection's output may be.
    x = torch.randn(batch, length, channels + (13 if strided else 0), device="cuda").to(dtype)
    inputs = {
        "x": x[..., 5 : 5 + channels] if strided else x,
        "weight": torch.randn(channels, width, device="cuda"),
        "bias": torch.randn(channels, device="cuda"),
        "initial_state": torch.randn(batch, width - 1, channels, device="cuda").to(dtype),
    }
    inputs = {name: value.requires_grad_() for name, value in inputs.items() if name not in without}
    if packed:
        inputs["seq_idx"] = (torch.rand(batch, length, device="cuda") < 0.2).cumsum(1).remainder(3).int()
    return inputs


def run(inputs: Inputs, grads: tuple[Tensor, Tensor], silu: bool = True) -> Inputs:
    """Outputs and gradients; in the dtype of the inputs, so that fp64 is computed by the reference."""
    y, state = causal_conv1d(**inputs, activation="silu" if silu else None, return_final_state=True)  # type: ignore[arg-type]
    names = [name for name, value in inputs.items() if value.requires_grad]
    found = torch.autograd.grad(
        [y, state], [inputs[name] for name in names], [grads[0].to(y.dtype), grads[1].to(y.dtype)]
    )
    return {"y": y.detach(), "state": state.detach()} | {f"d{n}": v for n, v in zip(names, found, strict=True)}


def check(inputs: Inputs, silu: bool = True) -> None:
    x, width = inputs["x"], inputs["weight"].shape[1]
    grads = (
        torch.randn(x.shape, device="cuda").to(x.dtype),
        torch.randn(x.shape[0], width - 1, x.shape[2], device="cuda").to(x.dtype),
    )
    assert launch.unsupported(x, inputs["weight"]) is None, "the Triton kernels did not run"
    exact = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in inputs.items()}
    assert_accurate(run(inputs, grads, silu), run(inputs, grads, silu), run(exact, grads, silu))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 61, 64, 65, 125, 129, 700])
@pytest.mark.parametrize("channels", [1, 8, 50, 256, 300, 1000])
def test_lengths_and_channels(length: int, channels: int) -> None:
    check(make_inputs(2, length, channels, torch.bfloat16, packed=length > 60))


@pytest.mark.parametrize("shape", [(2, 333, 1240), (1, 501, 4800), (8, 2048, 1000), (64, 1700, 512)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_sizes_that_are_divided_differently(shape: tuple[int, int, int], packed: bool) -> None:
    """In the backward in one round of programs that walk, and in several."""
    check(make_inputs(*shape, torch.bfloat16, packed=packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
def test_bits_do_not_depend_on_how_the_work_is_divided(dtype: torch.dtype, silu: bool) -> None:
    """A sequence alone, in a large batch and as the beginning of a longer one: a position falls on other steps."""
    x, grad = (torch.randn(16, 3000, 512, device="cuda").to(dtype) for _ in range(2))
    weight, bias = torch.randn(512, 4, device="cuda"), torch.randn(512, device="cuda")

    def x_grad(batch: int, length: int) -> Tensor:
        values = x[-batch:, :length].detach().requires_grad_()
        y = causal_conv1d(values, weight, bias, activation="silu" if silu else None)
        return torch.autograd.grad(y, values, grad[-batch:, :length])[0][-1]

    whole = x_grad(16, 3000)
    for batch, length in ((1, 3000), (16, 1001), (5, 1333), (1, 90)):
        complete = length - 3 if length < 3000 else length
        assert torch.equal(x_grad(batch, length)[:complete], whole[:complete]), (batch, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_y_alone(dtype: torch.dtype, width: int, silu: bool) -> None:
    """Without states and documents: the backward of small tensors has one round of loads, of larger ones several."""
    kinds = set()
    for shape in [(2, 1, 8), (3, 83, 72), (1, 85, 264), (2, 333, 50), (1, 501, 4800), (2, 84, 2000), (3, 2000, 1536)]:
        without = ("initial_state", "bias") if shape[2] == 50 else ("initial_state",)
        inputs = make_inputs(*shape, dtype, width, without, strided=shape[2] == 264)
        exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
        grad = torch.randn(shape, device="cuda").to(dtype)

        def run_y(values: Inputs, grad: Tensor = grad) -> Inputs:
            y = causal_conv1d(**values, activation="silu" if silu else None)  # type: ignore[arg-type]
            found = torch.autograd.grad(y, list(values.values()), grad.to(y.dtype))
            return {"y": y.detach()} | {f"d{n}": v for n, v in zip(values, found, strict=True)}

        assert_accurate(run_y(inputs), run_y(inputs), run_y(exact))
        kinds.add(launch.backward_shape(*shape, dispatch.processors(0), plain=True).stretches > 1)
    assert kinds == {False, True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_widths(dtype: torch.dtype, width: int, packed: bool, strided: bool) -> None:
    check(make_inputs(3, 150, 72, dtype, width, packed=packed, strided=strided))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("silu", [False, True])
def test_options(dtype: torch.dtype, without: tuple[str, ...], silu: bool) -> None:
    check(make_inputs(2, 200, 96, dtype, without=without, packed=True), silu)
    check(make_inputs(2, 200, 96, dtype, without=without), silu)


def test_views_of_projections_are_not_copied() -> None:
    whole = torch.randn(2, 4096, 2 * 512, device="cuda", dtype=torch.bfloat16)
    inputs = make_inputs(2, 4096, 512, torch.bfloat16, without=("initial_state",))
    for half in whole.chunk(2, dim=-1):
        inputs["x"] = half.detach().requires_grad_()
        check(inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            y = causal_conv1d(**inputs)  # type: ignore[arg-type]
        assert torch.cuda.max_memory_allocated() - before < y.nbytes + half.numel()


def test_gradient_of_the_state_alone() -> None:
    inputs = make_inputs(2, 2, 32, torch.float32, packed=True)
    grads = []
    for values in (inputs, {k: v if k == "seq_idx" else v.detach().double() for k, v in inputs.items()}):
        values = {k: v.detach().requires_grad_(k != "seq_idx") for k, v in values.items()}
        _, state = causal_conv1d(**values, return_final_state=True)  # type: ignore[arg-type]
        grads.append(torch.autograd.grad(state.sum(), [values["x"], values["initial_state"]]))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found.double(), wanted)


def test_compile_breaks_no_graph() -> None:
    inputs = make_inputs(2, 140, 64, torch.bfloat16)

    def loss(values: Inputs) -> Tensor:
        y, state = causal_conv1d(**values, activation="silu", return_final_state=True)  # type: ignore[arg-type]
        return y.float().square().sum() + state.float().sum()

    expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), list(inputs.values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_no_gradient_of_what_needs_none() -> None:
    x = torch.randn(2, 70, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 4, device="cuda", requires_grad=True)
    (grad,) = torch.autograd.grad(causal_conv1d(x, weight).float().sum(), [weight])
    assert grad.isfinite().all()


def test_reference_runs_what_the_kernels_cannot(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            inputs = make_inputs(2, 40, 24, torch.float32, width=5)
            y = causal_conv1d(**inputs)  # type: ignore[arg-type]
    exact = causal_conv1d(**{name: value.double() for name, value in inputs.items()})  # type: ignore[arg-type]
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    (line,) = [record.getMessage() for record in caplog.records if "width 5" in record.getMessage()]
    assert "causal_conv1d runs in plain PyTorch" in line


@pytest.mark.large_memory(40)
def test_more_than_2_to_the_31_elements() -> None:
    """The whole equals its parts, whose offsets fit in 32 bits; what is summed is near fp64's sums.

    How many programs share a sum depends on the number of channels, so those of a part are rounded otherwise.
    """
    batch, length, channels = 3, 2**18 + 17, 4160
    torch.use_deterministic_algorithms(False)  # filling outputs of this size takes long
    x, grad = (torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert x.numel() > 2**31
    weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")

    def results(*inputs: Tensor, grad: Tensor) -> tuple[Inputs, Inputs]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = causal_conv1d(*leaves, activation="silu")
        dx, dweight, dbias = torch.autograd.grad(y, leaves, grad)
        return {"y": y.detach(), "dx": dx}, {"dweight": dweight, "dbias": dbias}

    whole, sums = results(x, weight, bias, grad=grad)
    of_last_batch, _ = results(x[2:], weight, bias, grad=grad[2:])
    for name, part in of_last_batch.items():
        assert torch.equal(whole[name][2:], part), name
    del of_last_batch, part
    last = slice(channels - 64, channels)
    of_last_channels, _ = results(x[..., last], weight[last], bias[last], grad=grad[..., last])
    for name, part in of_last_channels.items():
        assert torch.equal(whole[name][..., last], part), name
    del whole
    _, again = results(x, weight, bias, grad=grad)
    _, exact = results(x[..., last].double(), weight[last].double(), bias[last].double(), grad=grad[..., last].double())
    assert_accurate({k: v[last] for k, v in sums.items()}, {k: v[last] for k, v in again.items()}, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(2, 1, 320), (2, 77, 320), (3, 1000, 512)], ids=str)
def test_errors_are_those_of_the_official_kernels(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    official_fn = pytest.importorskip("causal_conv1d", reason="needs the package causal-conv1d").causal_conv1d_fn

    def draw() -> tuple[Inputs, Inputs, Inputs]:
        inputs = make_inputs(*shape, dtype, without=("initial_state",))
        grads = (torch.randn(shape, device="cuda").to(dtype), torch.zeros(shape[0], 3, shape[2], device="cuda"))
        exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
        theirs = [inputs["x"].transpose(1, 2), inputs["weight"], inputs["bias"]]
        y = official_fn(*theirs, activation="silu").transpose(1, 2)
        found = torch.autograd.grad(y, list(inputs.values()), grads[0])
        named = {"y": y.detach()} | {f"d{n}": v for n, v in zip(inputs, found, strict=True)}
        return run(inputs, grads), named, run(exact, grads)

    assert_no_worse(draw)
