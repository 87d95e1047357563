"""The backward of the scan with the gradients of its activations written where the caller says.

A caller that needs an argument no longer has its gradient written over it, and one whose x and z are halves of a
projection's output gets their gradients as halves, too: both save a pass over memory.
"""

from __future__ import annotations

from torch import Tensor

from kernels.operator import operator
from kernels.selective_scan.cuda import scan
from kernels.selective_scan.reference import selective_scan_backward_op

_OUTPUTS = ("x_grad", "dt_grad", "z_grad")


@operator("mamba_train::selective_scan_backward_into", mutates_args=_OUTPUTS)
def selective_scan_backward_into(
    y_grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    x_grad: Tensor,
    dt_grad: Tensor,
    z_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fill x_grad, dt_grad (contiguous) and z_grad; return the gradients of A, B, C, D and dt_bias.

    All activations have one dtype. x_grad and dt_grad may be the memory of `dt` and `ungated`, z_grad that of
    `y_grad`.
    """
    dx, ddt, dA, dB, dC, dD, dz, dt_bias_grad, _ = selective_scan_backward_op(
        y_grad, None, x, dt, A, B, C, D, z, dt_bias, True, seq_idx, starts, ungated
    )
    for out, grad in ((x_grad, dx), (dt_grad, ddt), (z_grad, dz)):
        out.copy_(grad)
    return dA, dB, dC, dD, dt_bias_grad


@selective_scan_backward_into.register_fake
def _(y_grad, x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated, x_grad, dt_grad, z_grad):
    return tuple(t.new_empty(t.shape) for t in (A, B, C, D, dt_bias))


@selective_scan_backward_into.register_kernel("cuda")
def _(y_grad, x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated, x_grad, dt_grad, z_grad):
    if scan.unsupported(x, A.shape[1]):
        return selective_scan_backward_into._init_fn(
            y_grad, x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated, x_grad, dt_grad, z_grad
        )
    arguments = (y_grad, None, x, dt, A, B, C, D, z, dt_bias, True, seq_idx, starts, ungated)
    _, _, dA, dB, dC, dD, _, dt_bias_grad, _ = scan.backward(*arguments, scan.Outputs(x_grad, dt_grad, z_grad))
    return dA, dB, dC, dD, dt_bias_grad
