"""The gated norm over groups of channels against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from kernels.rms_norm import gated_rms_norm
from tests.kernels.loops import LENGTHS, Inputs, assert_all_close, gradients

EPS = 1e-3
CHANNELS = 12


def norm_loop(x: Tensor, z: Tensor, weight: Tensor, group_size: int, before: bool) -> Tensor:
    values = x if before else x * F.silu(z)
    groups = [g / (g.square().mean(-1, keepdim=True) + EPS).sqrt() for g in values.split(group_size, dim=-1)]
    y = torch.cat(groups, dim=-1) * weight
    return y * F.silu(z) if before else y


def draw_inputs(length: int, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, CHANNELS), "z": (2, length, CHANNELS), "weight": (CHANNELS,)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in drawn.items()}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("group_size", [1, 3, 4, CHANNELS, None])
@pytest.mark.parametrize("before", [False, True])
def test_equals_the_definition(length: int, group_size: int | None, before: bool) -> None:
    inputs = draw_inputs(length)
    actual = gated_rms_norm(**inputs, eps=EPS, group_size=group_size, norm_before_gate=before)
    expected = norm_loop(**inputs, group_size=group_size or CHANNELS, before=before)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("group_size", [3, CHANNELS])
@pytest.mark.parametrize("before", [False, True])
def test_gradcheck(group_size: int, before: bool) -> None:
    def function(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(x, z, weight, eps=EPS, group_size=group_size, norm_before_gate=before)

    assert gradcheck(function, tuple(draw_inputs(2).values()))


@pytest.mark.parametrize("before", [False, True])
def test_groups_do_not_touch_each_other(before: bool) -> None:
    inputs = draw_inputs(3)
    y = gated_rms_norm(**inputs, group_size=4, norm_before_gate=before)
    [x_grad] = torch.autograd.grad(y[..., 4:8].square().sum(), inputs["x"])
    assert (x_grad[..., 4:8] != 0).all()
    assert (x_grad[..., :4] == 0).all()
    assert (x_grad[..., 8:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [False, True])
def test_low_precision(dtype: torch.dtype, before: bool) -> None:
    inputs = {k: v.detach().to(dtype if k != "weight" else torch.float32) for k, v in draw_inputs(65).items()}
    exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    actual = gated_rms_norm(**inputs, eps=EPS, group_size=4, norm_before_gate=before)
    expected = norm_loop(**exact, group_size=4, before=before)
    assert actual.dtype == dtype
    found, wanted = gradients((actual,), inputs), gradients((expected,), exact)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for a, e in [(actual, expected), *((found[n], wanted[n]) for n in found)]:
        assert (a.double() - e).abs().max() / e.abs().max() < tolerance


def test_any_strides() -> None:
    inputs = draw_inputs(9)
    strided = {
        k: v.detach().clone().transpose(0, 1).contiguous().transpose(0, 1) for k, v in inputs.items() if k != "weight"
    }
    actual = gated_rms_norm(**strided, weight=inputs["weight"], group_size=4)
    torch.testing.assert_close(actual, gated_rms_norm(**inputs, group_size=4))


def test_zeros_have_a_finite_gradient() -> None:
    inputs = {k: torch.zeros_like(v).requires_grad_() for k, v in draw_inputs(2).items()}
    found = gradients((gated_rms_norm(**inputs),), inputs)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("before", [False, True])
def test_opcheck(before: bool) -> None:
    torch.library.opcheck(
        torch.ops.mamba_train.gated_rms_norm.default,
        (*draw_inputs(3).values(), EPS, 4, before),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_in_one_graph() -> None:
    inputs = draw_inputs(3)
    compiled = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(**inputs, group_size=4), gated_rms_norm(**inputs, group_size=4)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


def test_errors_name_the_argument() -> None:
    inputs = draw_inputs(2)
    with pytest.raises(ValueError, match=r"gated_rms_norm: group_size is 5, expected a divisor of the 12 channels"):
        gated_rms_norm(**inputs, group_size=5)
    with pytest.raises(ValueError, match=r"gated_rms_norm: z has shape \(2, 2, 3\), expected .*\(2, 2, 12\)"):
        gated_rms_norm(**inputs | {"z": inputs["z"][..., :3]})
    with pytest.raises(ValueError, match=r"gated_rms_norm: weight has shape \(3,\)"):
        gated_rms_norm(**inputs | {"weight": inputs["weight"][:3]})
