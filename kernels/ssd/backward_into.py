"""The backward of SSD with the gradients of its activations written where the caller says.

A caller whose x, B and C are slices of one tensor, and dt one of another, gets their gradients as such slices: that
saves a pass over memory.
"""

from __future__ import annotations

import math

from torch import Tensor

from kernels.dispatch import on_cuda
from kernels.operator import operator
from kernels.ssd import launch, launch_backward
from kernels.ssd.reference import ssd_backward_op


@operator("mamba_train::ssd_backward_into", mutates_args=("x_grad", "dt_grad", "B_grad", "C_grad"))
def ssd_backward_into(
    y_grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None,
    starts: Tensor,
    x_grad: Tensor,
    dt_grad: Tensor,
    B_grad: Tensor,
    C_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill x_grad, dt_grad, B_grad and C_grad; return the gradients of A, D and dt_bias.

    All activations have one dtype; B_grad and C_grad equal strides. x_grad, B_grad and C_grad may be the memory of x,
    B and C. Without a gate or an initial state, with softplus; `starts` as the operator `ssd` returned them.
    """
    dx, ddt, dA, dB, dC, dD, _, dt_bias_grad, _ = ssd_backward_op(
        *(y_grad, None, x, dt, A, B, C, D, None, dt_bias, True, 0.0, math.inf, chunk_size, seq_idx, starts),
        *(y_grad.new_empty((0,)), False),
    )
    for out, grad in ((x_grad, dx), (dt_grad, ddt), (B_grad, dB), (C_grad, dC)):
        out.copy_(grad)
    return dA, dD, dt_bias_grad


@ssd_backward_into.register_fake
def _(y_grad, x, dt, A, B, C, D, dt_bias, chunk_size, seq_idx, starts, x_grad, dt_grad, B_grad, C_grad):
    return tuple(t.new_empty(t.shape) for t in (A, D, dt_bias))


def launch_into(
    y_grad, x, dt, A, B, C, D, dt_bias, chunk_size, seq_idx, starts, x_grad, dt_grad, B_grad, C_grad
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on CUDA devices."""
    _, _, dA, _, _, dD, _, dt_bias_grad, _ = launch_backward.backward(
        *(y_grad, None, x, dt, A, B, C, D, None, dt_bias, True, 0.0, math.inf, chunk_size, seq_idx, starts),
        *(y_grad.new_empty((0,)), False),
        launch_backward.Outputs(x_grad, dt_grad, B_grad, C_grad),
    )
    return dA, dD, dt_bias_grad


on_cuda(ssd_backward_into, launch_into, lambda y_grad, x, *_: launch.unsupported(x, 0.0))
