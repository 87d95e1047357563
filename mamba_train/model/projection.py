"""A projection without bias, with its backward written out: where gradients go, and in which dtype.

The gradient of the input is written where the operator that made the input wants it. That of an fp32 weight leaves its
product in fp32 where that is not slower; PyTorch's own under autocast is rounded to bf16, written, and converted back.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.dispatch import processors

# Elements of a gradient up to which its product is not slower in fp32 than in bf16 with a conversion. On an H100, for
# 16,384 tokens: 3072 x 768 0.106 and 0.110 ms, 2560 x 5120 0.629 and 0.627, 10240 x 2560 1.165 and 1.124.
LARGEST_IN_FP32 = 2**23
# Numbers of a result that a multiprocessor computes at once; what cuBLAS takes for large products, or as much.
TILE = (256, 128)


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
                x_grad = input_gradient(y_grad, matrix, ctx.origin)
        return x_grad, weight_grad


def weight_gradient(y_grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (columns of y_grad, columns of x) of the weight in x · weightᵀ, summed in fp32, in `dtype`."""
    left, right = y_grad.flatten(0, -2).t(), x.flatten(0, -2)
    rows, columns = left.shape[0], right.shape[1]
    if not x.is_cuda or x.dtype == dtype or torch.compiler.is_compiling():
        return torch.mm(left, right).to(dtype)
    if rows * columns <= LARGEST_IN_FP32:
        return torch.mm(left, right, out_dtype=dtype)
    first = rows_at_once(rows, columns, processors(x.device.index))
    grad, converted = x.new_empty((rows, columns)), x.new_empty((rows, columns), dtype=dtype)
    torch.mm(left[:first], right, out=grad[:first])
    if first < rows:
        torch.mm(left[first:], right, out=grad[first:])
    # On an H100, 8512 x 2048: 46 us, `to` 56.
    torch._foreach_copy_([converted], [grad])
    return converted


def rows_at_once(rows: int, columns: int, n_processors: int) -> int:
    """All rows of a product, or without the last few where these, a tile in part, would cost a round of all processors.

    On an H100, for 16,384 tokens: 8512 x 2048 0.801 ms, 8448 x 2048 and 64 x 2048 0.711 ms together.
    """

    def rounds(rows: int) -> int:
        return math.ceil(math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1]) / n_processors)

    whole = rows // TILE[0] * TILE[0]
    return whole if whole and rounds(whole) < rounds(rows) else rows


def input_gradient(y_grad: Tensor, weight: Tensor, origin: Any) -> Tensor:
    """The gradient y_grad · weight of an input that the node `origin` of autograd returned, where that one wants it.

    One with an attribute `wide_grad`, like `FusedSSM`, wants it to be the second half of a tensor that it finds there.
    """
    shape = (*y_grad.shape[:-1], weight.shape[1])
    if hasattr(origin, "wide_grad"):
        origin.wide_grad = weight.new_empty((*shape[:-1], 2 * shape[-1]))
        x_grad = origin.wide_grad.chunk(2, dim=-1)[1]
    else:
        x_grad = weight.new_empty(shape)
    torch.mm(y_grad.flatten(0, -2), weight, out=x_grad.flatten(0, -2))
    return x_grad


def references(grad: Tensor) -> tuple[int, int]:
    """How many there are to a gradient, of Python and of C++; for the backward that was given it."""
    return sys.getrefcount(grad), grad._use_count()  # type: ignore[attr-defined]


@functools.cache
def references_alone() -> tuple[int, int]:
    """How many there are where the backward alone has it: more say that a hook keeps it or a user has asked for it."""
    _Counting.found = None
    with torch.inference_mode(False), torch.enable_grad():
        y = _Counting.apply(torch.ones((), device="cpu", requires_grad=True))
        (y * 2).backward()  # y's own gradient: that of the last node `backward` itself has, too
    assert _Counting.found is not None
    return _Counting.found


class _Counting(torch.autograd.Function):
    """Changes nothing; its backward counts references as that of any node may."""

    found: tuple[int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _Counting.found = references(grad)
        return grad
