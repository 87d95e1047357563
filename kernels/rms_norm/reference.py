"""Root-mean-square normalisation in plain PyTorch, with a backward that keeps one number per row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator


@operator("mamba_train::rms_norm")
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and 1 / rms, (..., 1)."""
    y, inverse_rms = _normalise(x.to(compute_dtype(x)), weight, eps)
    return y.to(x.dtype, memory_format=torch.contiguous_format), inverse_rms


@rms_norm_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x))


@operator("mamba_train::add_rms_norm")
def add_rms_norm_op(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the sum x + residual, and 1 / rms, (..., 1)."""
    dtype = compute_dtype(x)
    if residual is None:
        total = x.to(dtype, memory_format=torch.contiguous_format, copy=True)
    else:
        total = torch.add(x.to(dtype), residual.to(dtype)).contiguous()
    y, inverse_rms = _normalise(total, weight, eps)
    return y.to(x.dtype, memory_format=torch.contiguous_format), total, inverse_rms


@add_rms_norm_op.register_fake
def _(x, residual, weight, eps):
    dtype = compute_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*x.shape[:-1], 1), dtype=dtype),
    )


@operator("mamba_train::rms_norm_backward")
def rms_norm_backward_op(
    y_grad: Tensor,
    through: Tensor | None,
    x: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    with_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, plus `through`, in `dtype`; the same in the compute dtype or empty; that of weight."""
    compute = inverse_rms.dtype
    normalised = x.to(compute) * inverse_rms
    y_grad = y_grad.to(compute)
    weighted = y_grad * weight.to(compute)
    # d(x / rms) removes from the gradient its component along the normalised row.
    along = torch.linalg.vecdot(weighted, normalised).unsqueeze(-1) / x.shape[-1]
    x_grad = weighted.addcmul_(normalised, along, value=-1).mul_(inverse_rms)
    if through is not None:
        x_grad += through
    channels = x.shape[-1]
    weight_grad = normalised.mul_(y_grad).reshape(-1, channels).sum(dim=0)
    x_grad = x_grad.contiguous()
    total_grad = x_grad if with_total else x_grad.new_empty((0,))
    return x_grad.to(dtype, copy=with_total), total_grad, weight_grad.to(weight.dtype)


@rms_norm_backward_op.register_fake
def _(y_grad, through, x, inverse_rms, weight, dtype, with_total):
    total_grad = x.new_empty(x.shape if with_total else (0,), dtype=inverse_rms.dtype)
    return x.new_empty(x.shape, dtype=dtype), total_grad, weight.new_empty(weight.shape)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse_rms = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (x * inverse_rms).mul_(weight.to(x.dtype)), inverse_rms


def _setup_norm(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_backward(ctx, y_grad, _inverse_rms_grad):
    x, weight, inverse_rms = ctx.saved_tensors
    x_grad, _, weight_grad = rms_norm_backward_op(y_grad, None, x, inverse_rms, weight, x.dtype, False)
    return x_grad, weight_grad, None


rms_norm_op.register_autograd(_norm_backward, setup_context=_setup_norm)


def _setup_add_norm(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    _, total, inverse_rms = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, inverse_rms)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _add_norm_backward(ctx, y_grad, total_grad, _inverse_rms_grad):
    total, weight, inverse_rms = ctx.saved_tensors
    if y_grad is None and total_grad is None:
        return None, None, None, None
    if y_grad is None:
        x_grad, weight_grad = total_grad.to(ctx.x_dtype), torch.zeros_like(weight)
    else:
        # The residual's gradient is that of the sum; where x has the dtype of the sum, theirs are one tensor.
        with_total = ctx.residual_dtype is not None and ctx.x_dtype != total.dtype
        x_grad, total_grad, weight_grad = rms_norm_backward_op(
            y_grad, total_grad, total, inverse_rms, weight, ctx.x_dtype, with_total
        )
        total_grad = total_grad if with_total else x_grad
    residual_grad = None if ctx.residual_dtype is None else total_grad.to(ctx.residual_dtype)
    return x_grad, residual_grad, weight_grad, None


add_rms_norm_op.register_autograd(_add_norm_backward, setup_context=_setup_add_norm)
