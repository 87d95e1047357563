"""Who computes the loss: matrix products and Triton on NVIDIA GPUs, plain PyTorch everywhere else."""

from kernels.dispatch import on_cuda, triton_unsupported
from kernels.linear_cross_entropy import fused, reference

for op, accelerated in (
    (reference.linear_cross_entropy_op, fused.linear_cross_entropy),
    (reference.token_cross_entropy_op, fused.token_losses),
):
    on_cuda(op, accelerated, lambda hidden, *_: triton_unsupported(hidden))
