"""A projection without bias whose fp32 weight gets its gradient from a product that leaves its sums in fp32.

PyTorch's own under autocast rounds that gradient to bf16, writes it to memory, and converts it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Linear):
    """x · weightᵀ, (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if (
            device == "cuda"
            and torch.is_autocast_enabled(device)
            and x.dtype == torch.get_autocast_dtype(device)
            and self.weight.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            return MixedProduct.apply(x, self.weight)
        return super().forward(x)


class MixedProduct(torch.autograd.Function):
    """x · weightᵀ in the dtype of x, with the weight's gradient in the dtype of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        matrix = weight.to(x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.origin, ctx.weight_dtype = x.grad_fn, weight.dtype
        return F.linear(x, matrix)

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, matrix = ctx.saved_tensors
        x_grad, weight_grad = None, None
        with torch.autocast(y_grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                weight_grad = weight_gradient(y_grad, x, ctx.weight_dtype)
            del x  # it may have been computed again, just for this
            if ctx.needs_input_grad[0]:
                x_grad = _memory(ctx.origin, matrix, (*y_grad.shape[:-1], matrix.shape[1]))
                torch.mm(y_grad.flatten(0, -2), matrix, out=x_grad.flatten(0, -2))
        return x_grad, weight_grad


def weight_gradient(y_grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (columns of y_grad, columns of x) of the weight in x · weightᵀ, summed in fp32, in `dtype`."""
    left, right = y_grad.flatten(0, -2).t(), x.flatten(0, -2)
    if x.is_cuda and x.dtype != dtype and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _memory(origin: Any, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where to write the gradient of what the node `origin` returned.

    One with an attribute `wide_grad`, like `FusedSSM`, wants it to be the second half of what is then left there.
    """
    if not hasattr(origin, "wide_grad"):
        return like.new_empty(shape)
    origin.wide_grad = like.new_empty((*shape[:-1], 2 * shape[-1]))
    return origin.wide_grad.chunk(2, dim=-1)[1]
