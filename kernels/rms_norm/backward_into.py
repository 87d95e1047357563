"""The backward of the gated norm with the gradient of the gate written where the caller says."""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import on_cuda
from kernels.operator import operator
from kernels.rms_norm import launch
from kernels.rms_norm.gated import gated_rms_norm_backward_op


@operator("mamba_train::gated_rms_norm_backward_into", mutates_args=("z_grad",))
def gated_rms_norm_backward_into(
    y_grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, inverse_rms: Tensor, z_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill z_grad, its rows at equal distances; return the gradients of x and weight. Gated before the norm."""
    x_grad, dz, weight_grad = gated_rms_norm_backward_op(y_grad, x, z, weight, inverse_rms, False)
    z_grad.copy_(dz)
    return x_grad, weight_grad


@gated_rms_norm_backward_into.register_fake
def _(y_grad, x, z, weight, inverse_rms, z_grad):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def launch_into(
    y_grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, inverse_rms: Tensor, z_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same on CUDA devices."""
    size = x.shape[-1] // inverse_rms.shape[-2]
    x_grad, _, _, weight_grad = launch._backward(y_grad, None, x, z, weight, inverse_rms, size, x.dtype, z_grad=z_grad)
    return x_grad, weight_grad


on_cuda(
    gated_rms_norm_backward_into,
    launch_into,
    lambda y_grad, x, z, weight, inverse_rms, z_grad: launch.unsupported(x, x.shape[-1] // inverse_rms.shape[-2]),
)
