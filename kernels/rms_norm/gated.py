"""Gated RMS normalisation in plain PyTorch: the norm that follows SSD in Mamba-2, over groups of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator


@operator("mamba_train::gated_rms_norm")
def gated_rms_norm_op(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """Return y and 1 / rms, (..., group, 1)."""
    dtype = compute_dtype(x)
    gate = F.silu(z.to(dtype))
    values = x.to(dtype) if norm_before_gate else x.to(dtype) * gate
    groups = values.unflatten(-1, (-1, group_size))
    inverse_rms = torch.linalg.vecdot(groups, groups).div_(group_size).add_(eps).rsqrt_().unsqueeze(-1)
    y = (groups * inverse_rms).flatten(-2) * weight.to(dtype)
    if norm_before_gate:
        y *= gate
    return y.to(x.dtype, memory_format=torch.contiguous_format), inverse_rms


@gated_rms_norm_op.register_fake
def _(x, z, weight, eps, group_size, norm_before_gate):
    shape = (*x.shape[:-1], x.shape[-1] // group_size, 1)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=compute_dtype(x))


@operator("mamba_train::gated_rms_norm_backward")
def gated_rms_norm_backward_op(
    y_grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, inverse_rms: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, z and weight."""
    dtype = inverse_rms.dtype
    group_size = x.shape[-1] // inverse_rms.shape[-2]
    x_wide, z_wide, w = x.to(dtype), z.to(dtype), weight.to(dtype)
    sigmoid = torch.sigmoid(z_wide)
    gate = z_wide * sigmoid
    gate_slope = sigmoid * (1 + z_wide * (1 - sigmoid))
    values = x_wide if norm_before_gate else x_wide * gate
    normalised = (values.unflatten(-1, (-1, group_size)) * inverse_rms).flatten(-2)
    norm_grad = y_grad.to(dtype) * gate if norm_before_gate else y_grad.to(dtype)
    weight_grad = (norm_grad * normalised).reshape(-1, x.shape[-1]).sum(dim=0)

    # d(v / rms) removes from the gradient of a group its component along the normalised group.
    weighted, along = (v.unflatten(-1, (-1, group_size)) for v in (norm_grad * w, normalised))
    component = torch.linalg.vecdot(weighted, along).unsqueeze(-1) / group_size
    values_grad = ((weighted - along * component) * inverse_rms).flatten(-2)

    if norm_before_gate:
        x_grad, z_grad = values_grad, y_grad.to(dtype) * normalised * w * gate_slope
    else:
        x_grad, z_grad = values_grad * gate, values_grad * x_wide * gate_slope
    dense = torch.contiguous_format
    return (
        x_grad.to(x.dtype, memory_format=dense, copy=True),
        z_grad.to(z.dtype, memory_format=dense),
        weight_grad.to(weight.dtype),
    )


@gated_rms_norm_backward_op.register_fake
def _(y_grad, x, z, weight, inverse_rms, norm_before_gate):
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, z, weight, _, _, norm_before_gate = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.norm_before_gate = norm_before_gate


def _backward(ctx, y_grad, _inverse_rms_grad):
    grads = gated_rms_norm_backward_op(y_grad, *ctx.saved_tensors, ctx.norm_before_gate)
    return *grads, None, None, None


gated_rms_norm_op.register_autograd(_backward, setup_context=_setup_context)
