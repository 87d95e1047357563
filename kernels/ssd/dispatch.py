"""Who computes SSD: Triton on NVIDIA GPUs, plain PyTorch everywhere else and where Triton can't run."""

from collections.abc import Callable
from typing import Any

from kernels.dispatch import on_cuda
from kernels.ssd import launch, launch_backward, reference

_FORWARD, _BACKWARD = reference.ssd_op, reference.ssd_backward_op
assert _FORWARD._abstract_fn is not None
_reference_fake: Callable[..., Any] = _FORWARD._abstract_fn


def _unsupported_forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, *_):
    return launch.unsupported(x, dt_min)


def _unsupported_backward(y_grad, final_state_grad, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, *_):
    return launch.unsupported(x, dt_min)


on_cuda(_FORWARD, launch.forward, _unsupported_forward)
on_cuda(_BACKWARD, launch_backward.backward, _unsupported_backward)


@_FORWARD.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size, seq_idx, initial_state, *wants):
    if x.device.type == "cuda" and launch.unsupported(x, dt_min) is None:
        return launch.fake(x, B, z, initial_state, *wants)
    arguments = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size, seq_idx, initial_state)
    return _reference_fake(*arguments, *wants)
