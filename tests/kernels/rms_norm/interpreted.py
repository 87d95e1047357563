"""The norms' Triton kernels on the CPU, against their definition in fp64; test_triton.py runs this."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import add_rms_norm, gated, gated_rms_norm, launch, reference, rms_norm, shapes
from tests.kernels.loops import Inputs, gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "the kernels would be compiled, not interpreted"
reference.rms_norm_op.register_kernel("cpu")(launch.rms_norm)
reference.add_rms_norm_op.register_kernel("cpu")(launch.add_rms_norm)
reference.rms_norm_backward_op.register_kernel("cpu")(launch.rms_norm_backward)
gated.gated_rms_norm_op.register_kernel("cpu")(launch.gated_rms_norm)
gated.gated_rms_norm_backward_op.register_kernel("cpu")(launch.gated_rms_norm_backward)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that get several rows each, several at once, in pieces, and not the same number."""
    monkeypatch.setattr(launch, "forward_shape", lambda *_, **__: shapes.Shape(rows=2, block=8, warps=1))
    loop = shapes.LoopShape(rows=2, block=8, warps=1, programs=3, stages=2)
    monkeypatch.setattr(launch, "backward_shape", lambda *_: loop)


def draw(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    wide = ("weight", "residual")
    drawn = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {k: v.to(torch.float32 if k in wide else dtype).requires_grad_() for k, v in drawn.items()}


def check(inputs: Inputs, ours: Callable[..., object], definition: Callable[..., object], dtype: torch.dtype) -> None:
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual, expected = (f if isinstance(f, tuple) else (f,) for f in (ours(**inputs), definition(**exact)))
    found, wanted = gradients(actual, inputs), gradients(expected, exact)
    pairs = [(str(i), a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    for name, a, e in [*pairs, *((f"d{name}", found[name], wanted[name]) for name in found)]:
        assert a.shape == e.shape
        assert float((a.double() - e).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(e.abs().max())), name


def norm(x: Tensor, weight: Tensor, size: int | None = None) -> Tensor:
    groups = x.unflatten(-1, (-1, size or x.shape[-1]))
    return (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (3, 5), (9, 24)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_residual_add(length: int, channels: int, with_residual: bool, dtype: torch.dtype) -> None:
    rows = (2, length, channels)
    inputs = draw(dtype, x=rows, weight=(channels,), **({"residual": rows} if with_residual else {}))

    def definition(x: Tensor, weight: Tensor, residual: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        return norm(x + residual, weight), x + residual

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, EPS)

    check(inputs, ours, definition, dtype)
    if length == 1:
        for index in (0, 1):  # either output alone
            check(inputs, lambda i=index, **kw: ours(**kw)[i], lambda i=index, **kw: definition(**kw)[i], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("length", [1, 9])
def test_plain(length: int, dtype: torch.dtype) -> None:
    inputs = draw(dtype, x=(2, length, 12), weight=(12,))
    check(inputs, lambda x, weight: rms_norm(x, weight, eps=EPS), norm, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 24])
@pytest.mark.parametrize("before", [False, True])
def test_gated(size: int, before: bool, dtype: torch.dtype) -> None:
    inputs = draw(dtype, x=(2, 5, 24), z=(2, 5, 24), weight=(24,))

    def definition(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight, size) * F.silu(z) if before else norm(x * F.silu(z), weight, size)

    check(
        inputs,
        lambda **kw: gated_rms_norm(**kw, eps=EPS, group_size=size, norm_before_gate=before),
        definition,
        dtype,
    )


def test_views_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a projection's output: no copy, and gradients whose rows lie side by side."""
    halves = torch.randn(2, 5, 48)
    x, z = (half.requires_grad_() for half in halves.detach().chunk(2, dim=-1))
    dense = [t.detach().contiguous().requires_grad_() for t in (x, z)]
    weight = torch.randn(24)
    y_grad = halves.flip(0).chunk(2, dim=-1)[0]
    expected = gated_rms_norm(*dense, weight)
    expected_grads = torch.autograd.grad(expected, dense, y_grad.contiguous())
    monkeypatch.setattr(Tensor, "contiguous", lambda tensor: pytest.fail("a copy") if tensor.dim() > 1 else tensor)
    monkeypatch.setattr(Tensor, "clone", lambda tensor: pytest.fail("a copy"))
    y = gated_rms_norm(x, z, weight)
    assert torch.equal(y, expected)
    for found, wanted in zip(torch.autograd.grad(y, [x, z], y_grad), expected_grads, strict=True):
        assert torch.equal(found, wanted)


def test_no_rows() -> None:
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y, total = add_rms_norm(x, None, weight)
    (weight_grad,) = torch.autograd.grad(y.sum() + total.sum(), [weight])
    assert y.shape == total.shape == (0, 8)
    assert torch.equal(weight_grad, torch.zeros(8))
