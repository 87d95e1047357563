"""The middle of a Mamba-2 mixer as one node of autograd: what it saves, and where its gradients go.

Composed of the same operators as the plain form, it saves passes over memory that autograd cannot: the gradients of
z, of the convolution's input and of Δ are written as slices of one tensor, that of the projection's output, and those
of x, B and C as slices of another, where possible of the memory of x, B and C themselves.

With `recompute`, what SSD keeps for its backward besides its arguments, states above all, is computed again there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d.backward_into import causal_conv1d_backward_into
from kernels.causal_conv1d.reference import causal_conv1d_op
from kernels.rms_norm.backward_into import gated_rms_norm_backward_into
from kernels.rms_norm.gated import gated_rms_norm_op
from kernels.ssd.backward_into import ssd_backward_into
from kernels.ssd.reference import ssd_op
from mamba_train.model.fused_ssm import last_walk


class FusedMamba2(torch.autograd.Function):
    """The output of `Mamba2SSM.forward` from the projection's, and the weights as they are stored."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        seq_idx: Tensor | None,
        head_dim: int,
        groups: int,
        chunk_size: int,
        eps: float,
        recompute: bool,
    ) -> Tensor:
        """projected (batch, length, z and x, B, C and dt side by side). Returns (batch, length, d_inner)."""
        # Not `.float()`: that would hide from the audit that A_log arrived rounded.
        A = -torch.exp(A_log)
        z, xBC, dt = _parts(projected, conv_weight.shape[0], A.shape[0])
        conv, _ = causal_conv1d_op(xBC, conv_weight, conv_bias, True, seq_idx, None)
        x, B, C = _split(conv, z.shape[2], head_dim, groups)
        y, _, starts, _ = ssd_op(
            *(x, dt, A, B, C, D, None, dt_bias, True, 0.0, float("inf")),
            *(min(chunk_size, x.shape[1]), seq_idx, None, not recompute, False),
        )
        y = y.flatten(2)
        out, inverse_rms = gated_rms_norm_op(y, z, norm_weight, eps, y.shape[2] // groups, False)
        ctx.save_for_backward(
            *(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, seq_idx, conv, y, starts, inverse_rms)
        )
        ctx.sizes = (head_dim, groups, chunk_size)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, seq_idx, conv, y, starts, inverse_rms = (
            ctx.saved_tensors
        )
        head_dim, groups, chunk_size = ctx.sizes
        projected_grad = torch.empty_like(projected)
        z_grad, xBC_grad, dt_grad = _parts(projected_grad, conv_weight.shape[0], A.shape[0])
        z, xBC, dt = _parts(projected, conv_weight.shape[0], A.shape[0])
        # SSD's backward reads these values once, each before its gradient is there.
        conv_grad = conv if last_walk() else torch.empty_like(conv)
        x, B, C = _split(conv, z.shape[2], head_dim, groups)
        x_grad, B_grad, C_grad = _split(conv_grad, z.shape[2], head_dim, groups)
        with torch.autocast(projected.device.type, enabled=False):
            y_grad, norm_weight_grad = gated_rms_norm_backward_into(out_grad, y, z, norm_weight, inverse_rms, z_grad)
            A_grad, D_grad, dt_bias_grad = ssd_backward_into(
                *(y_grad.unflatten(2, (-1, head_dim)), x, dt, A, B, C, D, dt_bias, min(chunk_size, x.shape[1])),
                *(seq_idx, starts, x_grad, dt_grad, B_grad, C_grad),
            )
            del y_grad
            conv_weight_grad, conv_bias_grad = causal_conv1d_backward_into(
                conv_grad, None, xBC, conv_weight, conv_bias, seq_idx, xBC_grad
            )
        A_log_grad = A_grad.mul_(A)
        weights = (conv_weight_grad, conv_bias_grad, A_log_grad, D_grad, dt_bias_grad, norm_weight_grad)
        return projected_grad, *weights, None, None, None, None, None, None


def _parts(projected: Tensor, conv_channels: int, heads: int) -> Sequence[Tensor]:
    """Views: z, what the convolution gets, dt."""
    return projected.split((projected.shape[2] - conv_channels - heads, conv_channels, heads), dim=2)


def _split(conv: Tensor, d_inner: int, head_dim: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: x (batch, length, head, head_dim), B and C (batch, length, group, state)."""
    states = (conv.shape[2] - d_inner) // 2
    x, B, C = conv.split((d_inner, states, states), dim=2)
    return x.unflatten(2, (-1, head_dim)), B.unflatten(2, (groups, -1)), C.unflatten(2, (groups, -1))
