"""The backward of the convolution with the gradient of its input written where the caller says."""

from __future__ import annotations

from torch import Tensor

from kernels.causal_conv1d import launch
from kernels.causal_conv1d.reference import causal_conv1d_backward_op
from kernels.checks import compute_dtype
from kernels.dispatch import on_cuda
from kernels.operator import operator


@operator("mamba_train::causal_conv1d_backward_into", mutates_args=("x_grad",))
def causal_conv1d_backward_into(
    y_grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None,
    x_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill x_grad, of any strides along batch and length; return the gradients of weight and bias. With SiLU.

    The gradient of y is y_grad + more: added here, the sum is neither rounded nor written.
    """
    if more is not None:
        y_grad = y_grad.to(compute_dtype(x)) + more
    dx, weight_grad, bias_grad, _ = causal_conv1d_backward_op(y_grad, None, x, weight, bias, True, seq_idx, None)
    x_grad.copy_(dx)
    return weight_grad, bias_grad


@causal_conv1d_backward_into.register_fake
def _(y_grad, more, x, weight, bias, seq_idx, x_grad):
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def launch_into(
    y_grad: Tensor,
    more: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None,
    x_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same on CUDA devices."""
    return launch.backward(y_grad, None, x, weight, bias, True, seq_idx, None, x_grad, more)[1:3]


on_cuda(causal_conv1d_backward_into, launch_into, lambda y_grad, more, x, weight, *_: launch.unsupported(x, weight))
