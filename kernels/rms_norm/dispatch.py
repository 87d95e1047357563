"""Who computes the norms: Triton on NVIDIA GPUs, plain PyTorch everywhere else and where Triton can't run."""

from torch import Tensor

from kernels.dispatch import on_cuda
from kernels.rms_norm import gated, launch, reference


def _of_rows(x: Tensor, *_: object) -> str | None:
    return launch.unsupported(x, x.shape[-1])


on_cuda(reference.rms_norm_op, launch.rms_norm, _of_rows)
on_cuda(reference.add_rms_norm_op, launch.add_rms_norm, _of_rows)
on_cuda(reference.rms_norm_backward_op, launch.rms_norm_backward, lambda y_grad, through, x, *_: _of_rows(x))
on_cuda(
    gated.gated_rms_norm_op,
    launch.gated_rms_norm,
    lambda x, z, weight, eps, group_size, before: launch.unsupported(x, group_size),
)
on_cuda(
    gated.gated_rms_norm_backward_op,
    launch.gated_rms_norm_backward,
    lambda y_grad, x, z, weight, inverse_rms, before: launch.unsupported(x, x.shape[-1] // inverse_rms.shape[-2]),
)
