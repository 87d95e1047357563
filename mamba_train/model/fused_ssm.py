"""The selective SSM of Mamba-1 as one node of autograd: what it saves, computes again, and where its gradients go.

Composed of the same operators as the plain form, it saves passes over memory that autograd cannot: the gradients of x
and z are written as the two halves of one tensor, that of the convolution's output is summed where it is read.

With `recompute`, neither Δ nor what the scan returned is kept until the backward, but computed again there. What
follows the SSM keeps its output, too, and is made to forget it by `forgetting`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.causal_conv1d.backward_into import causal_conv1d_backward_into
from kernels.causal_conv1d.reference import causal_conv1d_op
from kernels.selective_scan.backward_into import selective_scan_backward_into
from kernels.selective_scan.reference import selective_scan_op
from mamba_train.model.projection import references, references_alone, weight_gradient


class Derived(NamedTuple):
    """What depends on the weights alone: the projections in the dtype of the activations, and A = -exp(A_log), fp32."""

    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor


class FusedSSM(torch.autograd.Function):
    """y of `SelectiveSSM.forward` from xz and the weights as they are stored."""

    @staticmethod
    def forward(
        ctx: Any,
        xz: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_proj_weight: Tensor,
        dt_proj_weight: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        seq_idx: Tensor | None,
        recompute: bool,
        derived: Derived | None,
    ) -> Tensor:
        """xz (batch, length, 2 · d_inner); the others as `SelectiveSSM` has them. Returns (batch, length, d_inner)."""
        if derived is None:
            # Copies: the backward computes again before an engine that frees gathered parameters has them back.
            dt_proj = dt_proj_weight.to(xz.dtype, copy=recompute)
            derived = Derived(x_proj_weight.to(xz.dtype), dt_proj, -torch.exp(A_log))
        x_proj, dt_proj, A = derived
        x_given, _ = xz.chunk(2, dim=-1)
        x, _ = causal_conv1d_op(x_given, conv_weight, conv_bias, True, seq_idx, None)
        projected = F.linear(x, x_proj)
        if recompute:  # copies, as above
            D, dt_bias = D.clone(), dt_bias.clone()
        y, dt, starts, ungated = _scan(xz, x, projected, dt_proj, A, D, dt_bias, seq_idx, for_backward=not recompute)
        again = () if recompute else (dt, starts, ungated)
        ctx.save_for_backward(
            *(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, seq_idx, x, projected, *again)
        )
        ctx.recompute = recompute
        ctx.computed_again = None
        ctx.wide_grad = None  # left by `Projection`: its second half is the gradient of y
        ctx.alone = None if torch.compiler.is_compiling() else references_alone()
        ctx.dtype = dt_proj_weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, seq_idx, x, projected, *saved = ctx.saved_tensors
        if ctx.recompute:
            dt, starts, ungated = ctx.computed_again or _compute_again(ctx)[1:]
            ctx.computed_again = None
        else:
            dt, starts, ungated = saved
        # The scan's backward reads these once, each value before its gradient is there.
        x_grad, dt_grad = (ungated, dt) if ctx.recompute or last_walk() else (torch.empty_like(dt) for _ in range(2))
        with torch.autocast(xz.device.type, enabled=False):
            (x_given, z), rank, states = xz.chunk(2, dim=-1), dt_proj.shape[1], A.shape[1]
            dt_low, B, C = projected.split((rank, states, states), dim=-1)
            # The scan's backward reads the gradient of y once, before it writes that of z. Nobody else may have it.
            xz_grad, ctx.wide_grad = ctx.wide_grad, None
            if (
                xz_grad is None
                or xz_grad.chunk(2, dim=-1)[1].data_ptr() != y_grad.data_ptr()
                or references(y_grad) != ctx.alone
            ):
                xz_grad = torch.empty_like(xz)
            x_given_grad, z_grad = xz_grad.chunk(2, dim=-1)
            A_grad, B_grad, C_grad, D_grad, dt_bias_grad = selective_scan_backward_into(
                *(y_grad, x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated, x_grad, dt_grad, z_grad)
            )
            projected_grad = torch.cat((dt_grad @ dt_proj, B_grad, C_grad), dim=-1)
            dt_proj_grad = weight_gradient(dt_grad, dt_low, ctx.dtype)
            x_proj_grad = weight_gradient(projected_grad, x, ctx.dtype)
            through_x_proj = dt_grad  # no longer needed, and of the same size
            through_x_proj.flatten(0, 1).addmm_(projected_grad.flatten(0, 1), x_proj, beta=0)
            conv_weight_grad, conv_bias_grad = causal_conv1d_backward_into(
                x_grad, through_x_proj, x_given, conv_weight, conv_bias, seq_idx, x_given_grad
            )
        return (
            xz_grad,
            conv_weight_grad,
            conv_bias_grad,
            x_proj_grad,
            dt_proj_grad,
            A_grad.mul_(A),  # of A_log
            D_grad,
            dt_bias_grad,
            None,
            None,
            None,
        )


def forgetting(y: Tensor) -> AbstractContextManager[object]:
    """While it lasts, what would save y for the backward has it computed again by the `FusedSSM` that made it."""
    if torch.compiler.is_compiling() or not getattr(y.grad_fn, "recompute", False):
        return nullcontext()
    node: Any = y.grad_fn
    address, size = y.data_ptr(), y.numel()

    def pack(tensor: Tensor) -> Tensor | _Forgotten:
        is_y = tensor.data_ptr() == address and tensor.numel() == size and tensor.is_contiguous()
        return _Forgotten(node, tensor.shape) if is_y else tensor

    def unpack(packed: Tensor | _Forgotten) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        y, *packed.node.computed_again = _compute_again(packed.node)
        return y.view(packed.shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def last_walk() -> bool:
    """Whether the backward at work frees its graph, so that what was saved for it may be overwritten."""
    return not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()


@dataclass
class _Forgotten:
    """In place of a saved tensor: what computes it again, and its shape."""

    node: Any
    shape: torch.Size


def _compute_again(node: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    xz, _, _, _, dt_proj, A, D, dt_bias, seq_idx, x, projected = node.saved_tensors
    with torch.no_grad(), torch.autocast(xz.device.type, enabled=False):
        return _scan(xz, x, projected, dt_proj, A, D, dt_bias, seq_idx, for_backward=True)


def _scan(
    xz: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, Δ before bias and softplus, and what the scan's backward needs: its saved states and y before the gate."""
    dt_low, B, C = projected.split((dt_proj.shape[1], A.shape[1], A.shape[1]), dim=-1)
    dt = F.linear(dt_low, dt_proj)
    z = xz.chunk(2, dim=-1)[1]
    y, _, starts, ungated = selective_scan_op(x, dt, A, B, C, D, z, dt_bias, True, seq_idx, None, for_backward)
    return y, dt, starts, ungated
