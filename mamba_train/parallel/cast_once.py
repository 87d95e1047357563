"""Linear layers that compute with one copy of their weight per step, and sum its gradient in fp32 where it is kept.

Autocast casts every weight in every micro-batch. Its backward writes the gradient in bf16, casts it, and adds it to
zeros or to what is there: 26 bytes of traffic per weight and micro-batch. Here the copy is made again only when the
weight has changed, and the matrix product itself writes the fp32 gradient in the step's first micro-batch, and adds to
it in others: 4 bytes or 8, no zeros, and one rounding less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_train.model.projection import input_gradient


class CastOnce:
    """Has the linear layers among `modules` compute with copies of their weights in `dtype` wherever autocast is on.

    first: whether the next backward pass is the first of its step, which overwrites gradients. on_gradient, when set:
    is called with each weight whose gradient a backward pass has completed.
    """

    first = False

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        linears = [module for module in modules if isinstance(module, nn.Linear) and module.bias is None]
        self.weights = [linear.get_parameter("weight") for linear in linears]
        self._copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in self.weights]
        self.copies = dict(zip(self.weights, self._copies, strict=True))
        self._versions: list[int | None] = [None] * len(linears)
        self.on_gradient: Callable[[Tensor], None] | None = None
        for linear, weight, copy in zip(linears, self.weights, self._copies, strict=True):
            linear.forward = partial(self._linear, weight, copy)

    @torch.no_grad()
    def refresh(self, *, all_of_them: bool = False) -> None:
        """Bring the copies up to date; all_of_them: after an update, which changes weights without torch noting it."""
        versions = [weight._version for weight in self.weights]
        changed = [
            number
            for number, (version, seen) in enumerate(zip(versions, self._versions, strict=True))
            if all_of_them or version != seen
        ]
        if changed:
            copies, weights = ([tensors[number] for number in changed] for tensors in (self._copies, self.weights))
            torch._foreach_copy_(copies, weights)
        self._versions = list(versions)

    def _linear(self, weight: Tensor, copy: Tensor, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight)
        return _CastLinear.apply(x.to(copy.dtype), weight, copy, self)


class _CastLinear(torch.autograd.Function):
    """x (..., in) times the transpose of `copy` (out, in); the gradient of `weight` goes to `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, copy: Tensor, casts: CastOnce) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.weight, ctx.casts, ctx.origin = weight, casts, x.grad_fn
        return F.linear(x, copy)

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, copy = ctx.saved_tensors
        weight: nn.Parameter = ctx.weight
        is_first = ctx.casts.first or weight.grad is None
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        product(y_grad.flatten(0, -2).t(), x.flatten(0, -2), weight.grad, add=not is_first)
        del x  # it may have been computed again, just for this
        if ctx.casts.on_gradient is not None:
            ctx.casts.on_gradient(weight)
        x_grad = input_gradient(y_grad, copy, ctx.origin) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, None


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (fp32) = a @ b, or out += a @ b, summed in fp32 whatever the dtype of a and b."""
    if not out.is_cuda:  # on the CPU products have no other dtype than their factors
        out.copy_(torch.addmm(out, a.float(), b.float()) if add else a.float() @ b.float())
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
