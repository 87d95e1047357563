"""The norm and the fused residual add against their definition."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels.rms_norm import add_rms_norm, rms_norm
from tests.kernels.loops import LENGTHS, assert_all_close, gradients

EPS = 1e-3


def norm_loop(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([row / (row.square().mean() + EPS).sqrt() * weight for row in rows]).view(x.shape)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_equals_the_definition(length: int, with_residual: bool) -> None:
    inputs = {"x": draw(2, length, 5), "weight": draw(5, seed=1)}
    residual = draw(2, length, 5, seed=2) if with_residual else None
    total = inputs["x"] if residual is None else inputs["x"] + residual
    if residual is not None:
        inputs["residual"] = residual
    expected = (norm_loop(total, inputs["weight"]), total)
    actual = add_rms_norm(inputs["x"], residual, inputs["weight"], EPS)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-11)

    alone = rms_norm(inputs["x"], inputs["weight"], eps=EPS)
    torch.testing.assert_close(alone, norm_loop(inputs["x"], inputs["weight"]))


def test_gradcheck() -> None:
    x, residual, weight = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(4, seed=2)
    assert gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), (x, weight))
    assert gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (x, residual, weight))
    assert gradcheck(lambda x, w: add_rms_norm(x, None, w, EPS), (x, weight))


def test_either_output_alone_takes_part() -> None:
    inputs = {"x": draw(2, 3, 4), "residual": draw(2, 3, 4, seed=1), "weight": draw(4, seed=2)}
    total = inputs["x"] + inputs["residual"]
    for index, expected in enumerate((norm_loop(total, inputs["weight"]), total)):
        actual = add_rms_norm(inputs["x"], inputs["residual"], inputs["weight"], EPS)[index]
        assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


def test_the_sum_is_fp32_for_bf16_activations() -> None:
    """2^-10 is lost beside 1 in bf16 and must not be lost in the residual stream."""
    x = torch.full((1, 1, 8), 2.0**-10, dtype=torch.bfloat16)
    y, total = add_rms_norm(x, torch.full((1, 1, 8), 1 + 2.0**-12), torch.ones(8))
    assert y.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.full((1, 1, 8), 1 + 2.0**-10 + 2.0**-12))
    assert add_rms_norm(x, None, torch.ones(8))[1].dtype == torch.float32


def test_low_precision() -> None:
    exact = {"x": draw(2, 65, 16), "residual": draw(2, 65, 16, seed=1), "weight": draw(16, seed=2)}
    inputs = {
        k: v.detach().to(torch.bfloat16 if k == "x" else torch.float32).requires_grad_() for k, v in exact.items()
    }
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    actual = add_rms_norm(inputs["x"], inputs["residual"], inputs["weight"], EPS)
    total = exact["x"] + exact["residual"]
    expected = (norm_loop(total, exact["weight"]), total)
    found, wanted = gradients(actual, inputs), gradients(expected, exact)
    assert all(found[name].dtype == inputs[name].dtype for name in found)
    for a, e in [*zip(actual, expected, strict=True), *((found[n], wanted[n]) for n in found)]:
        assert (a.double() - e).abs().max() / e.abs().max() < 1e-2


def test_any_strides() -> None:
    wide, weight = draw(3, 2, 10), draw(5, seed=1)
    strided = wide.transpose(0, 1)[:, :, 5:]
    torch.testing.assert_close(rms_norm(strided, weight), rms_norm(strided.contiguous(), weight))
    torch.testing.assert_close(
        add_rms_norm(strided, strided, weight), add_rms_norm(strided.contiguous(), strided.contiguous(), weight)
    )


def test_zeros_have_a_finite_gradient() -> None:
    inputs = {"x": torch.zeros(1, 2, 4, requires_grad=True), "weight": torch.ones(4, requires_grad=True)}
    found = gradients((rms_norm(**inputs),), inputs)
    assert all(value.isfinite().all() for value in found.values())


def test_opcheck() -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, residual, weight = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(4, seed=2)
    torch.library.opcheck(torch.ops.mamba_train.rms_norm.default, (x, weight, EPS), test_utils=utils)
    for r in (residual, None):
        torch.library.opcheck(torch.ops.mamba_train.add_rms_norm.default, (x, r, weight, EPS), test_utils=utils)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = {"x": draw(2, 3, 4), "residual": draw(2, 3, 4, seed=1), "weight": draw(4, seed=2)}
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend=backend)
    actual, expected = compiled(**inputs), add_rms_norm(**inputs)
    assert_all_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-11)


def test_errors_name_the_argument_and_its_shape() -> None:
    x = draw(2, 3, 4)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(5,\), expected \(channel=4\)"):
        rms_norm(x, draw(5))
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \(2, 3, 5\), expected .*\(2, 3, 4\)"):
        add_rms_norm(x, draw(2, 3, 5), draw(4))
    with pytest.raises(ValueError, match=r"rms_norm: x has dtype torch.int64"):
        rms_norm(torch.ones(2, 4, dtype=torch.int64), draw(4))
