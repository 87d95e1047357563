"""Who computes the convolution: Triton on NVIDIA GPUs, plain PyTorch everywhere else and where Triton can't run."""

from kernels.causal_conv1d import launch, reference
from kernels.dispatch import on_cuda

on_cuda(reference.causal_conv1d_op, launch.forward, lambda x, weight, *_: launch.unsupported(x, weight))
on_cuda(
    reference.causal_conv1d_backward_op,
    launch.backward,
    lambda y_grad, final_grad, x, weight, *_: launch.unsupported(x, weight),
)
