"""Layers that compute with one copy of their matrices per step, and sum a gradient in fp32 where it is kept.

Autocast casts every weight in every micro-batch. Its backward writes the gradient in bf16, casts it, and adds it to
zeros or to what is there: 26 bytes of traffic per weight and micro-batch. Here the copy is made again only when the
weight has changed, and the matrix product itself writes the fp32 gradient in the step's first micro-batch, and adds to
it in others: 4 bytes or 8, no zeros, and one rounding less. A `SelectiveSSM` is given what it would derive from its
weights in each pass: little work, but six launches in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_train.model.fused_ssm import Derived
from mamba_train.model.projection import input_gradient
from mamba_train.model.selective_ssm import SelectiveSSM


class CastOnce:
    """Has linear layers and SSMs of `modules` compute with copies of their matrices in `dtype` wherever autocast is on.

    copies: by weight. linears: the weights of linear layers. first: whether the next backward pass is the first of its
    step, which overwrites gradients. on_gradient, when set: is called with each weight whose gradient a backward pass
    has completed.
    """

    first = False

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.linears: set[Tensor] = set()
        self._A: dict[Tensor, Tensor] = {}  # by A_log
        self._versions: dict[Tensor, int] = {}
        self.on_gradient: Callable[[Tensor], None] | None = None
        for module in modules:
            if isinstance(module, nn.Linear) and module.bias is None:
                weight = module.get_parameter("weight")
                self.linears.add(weight)
                module.forward = partial(self._linear, weight, self._copy(weight, dtype))
            elif isinstance(module, SelectiveSSM):
                self._A[module.A_log] = torch.empty_like(module.A_log, requires_grad=False)
                x_proj, dt_proj = (self._copy(w, dtype) for w in (module.x_proj_weight, module.dt_proj_weight))
                module.derived = Derived(x_proj, dt_proj, self._A[module.A_log])

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        self.copies[weight] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        return self.copies[weight]

    def refresh(self) -> None:
        """Bring everything up to date with weights that torch has seen change."""
        changed = {weight for weight in (*self.copies, *self._A) if weight._version != self._versions.get(weight)}
        self._make([w for w in self.copies if w in changed], [A_log for A_log in self._A if A_log in changed])
        self._versions |= {weight: weight._version for weight in changed}

    def updated(self, *, with_copies: bool) -> None:
        """After an update, which torch need not have seen; with_copies: it has brought those up to date itself."""
        self._make([] if with_copies else list(self.copies), list(self._A))
        self._versions = {weight: weight._version for weight in (*self.copies, *self._A)}

    @torch.no_grad()
    def _make(self, weights: list[Tensor], A_logs: list[Tensor]) -> None:
        if weights:
            torch._foreach_copy_([self.copies[weight] for weight in weights], weights)
        if A_logs:
            As = [self._A[A_log] for A_log in A_logs]
            torch._foreach_copy_(As, A_logs)
            torch._foreach_exp_(As)
            torch._foreach_neg_(As)

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
