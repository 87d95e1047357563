"""The Triton norms against their fp64 references: every dtype, kind, option and layout."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d import launch as conv_launch
from kernels.rms_norm import add_rms_norm, gated_rms_norm, launch, rms_norm
from tests.gpu.errors import DTYPES, Inputs, assert_accurate, assert_no_worse, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
EPS = 1e-5
Operator = Callable[..., tuple[Tensor, ...]]


def add(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    return add_rms_norm(x, residual, weight, EPS)


def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm(x, weight, eps=EPS),)


def gated(before: bool, groups: int = 1) -> Operator:
    def operator(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        size = x.shape[-1] // groups
        return (gated_rms_norm(x, z, weight, eps=EPS, group_size=size, norm_before_gate=before),)

    return operator


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, *names: str, strided: bool = False) -> Inputs:
    """x and the others in `names`, of `shape`; the residual fp32, and the weight (channel)."""
    channels = shape[-1]

    def activation(name: str) -> Tensor:
        wide = torch.randn(*shape[:-1], channels + (13 if strided else 0), device="cuda")
        return wide.to(torch.float32 if name == "residual" else dtype)[..., 5 if strided else 0 :][..., :channels]

    inputs = {name: activation(name) for name in ("x", *names)} | {"weight": torch.randn(channels, device="cuda")}
    return {name: value.requires_grad_() for name, value in inputs.items()}


def run(operator: Operator, inputs: Inputs, grads: list[Tensor]) -> Inputs:
    outputs = operator(**inputs)
    weights = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=False)]
    found = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"d{name}": value for name, value in zip(inputs, found, strict=True)}


def doubled(inputs: Inputs) -> Inputs:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def check(operator: Operator, inputs: Inputs) -> None:
    x = inputs["x"]
    assert launch.unsupported(x, x.shape[-1]) is None, "the Triton kernels did not run"
    grads = [torch.randn(x.shape, device="cuda").to(dtype) for dtype in (x.dtype, torch.float32)]
    ours, again = run(operator, inputs, grads), run(operator, inputs, grads)
    assert_accurate(ours, again, run(operator, doubled(inputs), grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [2, 8, 50, 64, 608, 768, 1000, 1288, 2560, 4088, 5120, 8200])
@pytest.mark.parametrize("rows", [(1, 1), (3, 77)])
def test_sizes(rows: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    if channels == 2 and rows == (1, 1):
        rows = (1, 77)  # the gradient of one pair is a difference that may cancel to nothing, in any fp32 arithmetic
    shape = (*rows, channels)
    check(add, make_inputs(shape, dtype, "residual"))
    check(gated(before=False), make_inputs(shape, dtype, "z"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 9, 72])
@pytest.mark.parametrize("before", [False, True])
def test_gated(before: bool, groups: int, strided: bool, dtype: torch.dtype) -> None:
    check(gated(before, groups), make_inputs((2, 300, 144), dtype, "z", strided=strided))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_plain_and_without_residual(strided: bool, dtype: torch.dtype) -> None:
    for operator, names in ((plain, ()), (add, ()), (add, ("residual",))):
        check(operator, make_inputs((2, 1500, 256), dtype, *names, strided=strided))


@pytest.mark.parametrize("strided", [False, True])
def test_more_than_the_cache_holds(strided: bool) -> None:
    """The first programs ask for their rows ahead, wherever these begin."""
    shape = (3, 3001, 1001)
    check(add, make_inputs(shape, torch.bfloat16, "residual", strided=strided))
    check(gated(before=False, groups=7), make_inputs(shape, torch.bfloat16, "z", strided=strided))
    check(plain, make_inputs((3, 6001, 1001), torch.bfloat16, strided=strided))


def test_a_residual_of_the_dtype_of_x() -> None:
    inputs = make_inputs((2, 50, 256), torch.bfloat16, "residual")
    inputs["residual"] = inputs["residual"].detach().bfloat16().requires_grad_()
    check(add, inputs)


def test_either_output_alone() -> None:
    inputs = make_inputs((2, 50, 256), torch.float32, "residual")
    for index in (0, 1):
        found, wanted = (
            torch.autograd.grad(add(**values)[index].square().sum(), list(values.values()), materialize_grads=True)
            for values in (inputs, doubled(inputs))
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_views_of_projections_are_not_copied() -> None:
    whole = torch.randn(2, 4096, 2 * 512, device="cuda", dtype=torch.bfloat16)
    x, z = whole.chunk(2, dim=-1)
    weight = torch.ones(512, device="cuda")
    check(gated(before=False), {k: v.detach().requires_grad_() for k, v in (("x", x), ("z", z), ("weight", weight))})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = gated_rms_norm(x, z, weight)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + x.numel()


@pytest.mark.parametrize(("operator", "name"), [(add, "residual"), (gated(before=False, groups=2), "z")])
def test_compile_breaks_no_graph(operator: Operator, name: str) -> None:
    inputs = make_inputs((2, 40, 64), torch.bfloat16, name)

    def loss(values: Inputs) -> Tensor:
        return sum(output.float().square().sum() for output in operator(**values))  # type: ignore[return-value]

    expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), list(inputs.values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_reference_runs_what_the_kernels_cannot(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_fallback.cache_clear()
    inputs = make_inputs((2, 3, launch.MAX_SIZE + 1), torch.float32, "residual")
    with caplog.at_level(logging.WARNING):
        y, _ = add(**inputs)
    torch.testing.assert_close(y.double(), add(**doubled(inputs))[0], rtol=1e-4, atol=1e-5)
    assert any(f"{launch.MAX_SIZE + 1} channels are more than" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("rows", "channels"), [(4096, 768), (333, 2560), (20000, 608)])
def test_early_start_waits_for_what_comes_before(rows: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right behind each kind of kernel, copy and stream that it can follow: the same bits as without."""
    if not dispatch.can_start_early(0):
        pytest.skip("needs compute capability 9.0")
    x, matrix = torch.randn(rows, channels, device="cuda"), torch.randn(channels, channels, device="cuda")
    x, matrix, weight = x.bfloat16(), matrix.bfloat16() / channels**0.5, torch.ones(channels, device="cuda")
    filters, side = torch.randn(channels, 4, device="cuda"), torch.cuda.Stream()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, filters)]

    def chain() -> list[Tensor]:
        value, residual = x, None
        for step in range(8):
            y, residual = add_rms_norm(value, residual, weight, EPS)
            normed = gated_rms_norm(y, value, weight)  # one early start right behind another
            value = (y + causal_conv1d(normed[None], filters)[0]) @ matrix
            if step % 4 == 1:
                value = torch.zeros_like(value).copy_(value)
            if step % 4 == 2:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    value = value * 1.5
                torch.cuda.current_stream().wait_stream(side)
            if step % 4 == 3:
                value = value.clone()
        assert residual is not None
        outputs = value.detach(), residual.detach()
        return [*outputs, *torch.autograd.grad([value, residual], leaves, outputs)]

    def found() -> list[Tensor]:
        """Five eager runs and five of a graph."""
        results = [tensor.clone() for _ in range(5) for tensor in chain()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain()
        for _ in range(5):
            for _ in range(3):
                graph.replay()
            results += [tensor.clone() for tensor in outputs]
        return results

    torch.use_deterministic_algorithms(False)  # what fills outputs would come between the kernels
    early = found()
    for module in (launch, conv_launch):
        monkeypatch.setattr(module, "early_start", lambda _: {"PDL": False})
    for a, b in zip(early, found(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.large_memory(60)
@pytest.mark.parametrize("kind", ["add", "gated"])
def test_more_than_2_to_the_31_elements(kind: str) -> None:
    """The whole equals its parts, whose offsets fit in 32 bits; the sums over rows are theirs but for rounding."""
    rows, channels = 2**19 + 17, 4160
    torch.use_deterministic_algorithms(False)  # filling outputs of this size takes long
    x, grad, other = (torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert x.numel() > 2**31
    weight = torch.randn(channels, device="cuda", requires_grad=True)
    operator = add if kind == "add" else gated(before=False)

    def results(part: slice) -> tuple[Tensor, list[Tensor]]:
        """The weight's gradient; and what has rows."""
        leaves = {"x": x, "residual" if kind == "add" else "z": other}
        leaves = {name: leaf[part].detach().requires_grad_() for name, leaf in leaves.items()}
        outputs = operator(**leaves, weight=weight)
        weight_grad, *grads = torch.autograd.grad(outputs[0], [weight, *leaves.values()], grad[part])
        return weight_grad.double(), [*(output.detach() for output in outputs), *grads]

    weight_grad, whole = results(slice(None))
    end = slice(rows - 1000, rows)
    for a, b in zip(whole, results(end)[1], strict=True):
        assert torch.equal(a[end], b)
    del whole, a
    expected = sum(results(slice(first, first + 2**16))[0] for first in range(0, rows, 2**16))
    assert (weight_grad - expected).norm() < 1e-5 * expected.norm()  # type: ignore[union-attr]


def official_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return rms_norm_fn(x, weight, None, residual=residual, eps=EPS, prenorm=True, residual_in_fp32=True)


def official_gated(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return (rmsnorm_fn(x, weight, None, z=z, eps=EPS, group_size=x.shape[-1] // 2, norm_before_gate=False),)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 7, 768), (2, 500, 768), (3, 100, 2560)], ids=str)
@pytest.mark.parametrize("kind", ["add", "gated"])
def test_errors_are_those_of_mamba_ssm(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("mamba_ssm", reason="needs mamba_ssm")
    ours, theirs, name = (
        (add, official_add, "residual") if kind == "add" else (gated(False, groups=2), official_gated, "z")
    )

    def draw() -> tuple[Inputs, Inputs, Inputs]:
        inputs = make_inputs(shape, dtype, name)
        grads = [torch.randn(shape, device="cuda").to(each) for each in (dtype, torch.float32)]
        return run(ours, inputs, grads), run(theirs, inputs, grads), run(ours, doubled(inputs), grads)

    assert_no_worse(draw)
