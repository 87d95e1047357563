"""Who computes the scan: CUDA C++ on NVIDIA GPUs, plain PyTorch everywhere else and where the former can't run.

Importing this module registers the CUDA kernels for the operators that `reference` defines, so that the operators,
their autograd formula and what an audit sees of them are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels.selective_scan import reference
from kernels.selective_scan.cuda import scan

_FORWARD, _BACKWARD = reference.selective_scan_op, reference.selective_scan_backward_op


def _known(function: Callable[..., Any] | None) -> Callable[..., Any]:
    assert function is not None
    return function


_reference_fake = _known(_FORWARD._abstract_fn)


@_FORWARD.register_kernel("cuda")
def _forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, for_backward):
    compute = _FORWARD._init_fn if scan.unsupported(x, A.shape[1]) else scan.forward
    return compute(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, for_backward)


@_FORWARD.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, for_backward):
    if x.device.type != "cuda" or scan.unsupported(x, A.shape[1]):
        return _reference_fake(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, for_backward)
    # Not by the reference's, which asks how its work would be cut: that would make each length a graph of its own.
    return scan.fake(x, A.shape[1], z is not None, for_backward)


@_BACKWARD.register_kernel("cuda")
def _backward(y_grad, final_state_grad, x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, starts, ungated):
    compute = _BACKWARD._init_fn if scan.unsupported(x, A.shape[1]) else scan.backward
    return compute(y_grad, final_state_grad, x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, starts, ungated)
