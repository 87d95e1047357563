"""One decode step of the selective scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import (
    check_floating,
    check_in_place,
    check_same_device,
    check_tensor,
    compute_dtype,
    narrowed,
    needs_gradient,
)
from kernels.dispatch import on_cuda, triton_unsupported
from kernels.operator import operator
from kernels.selective_scan import step_launch


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    A_is_log: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance `state` by one position; the same as `selective_scan` on a sequence of length 1.

    Shapes: state (batch, channel, state) fp32; x, dt, z (batch, channel); A (channel, state); B, C (batch, state);
    D, dt_bias (channel). Returns y (batch, channel) in the dtype of x and the new state in fp32 (fp64 for fp64 x).
    A_is_log: `A` holds log(-A), as models store it, which saves two passes over it.
    in_place: `state`, of any floating dtype, becomes the new state, without gradients; otherwise it is not changed.
    Raises ValueError naming the argument that does not fit.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    arguments = (state, x, dt, A, B, C, D, z, dt_bias)
    if in_place:
        check_in_place("selective_scan_step", *arguments)
    if x.is_cuda and not needs_gradient(*arguments):
        if in_place:
            return torch.ops.mamba_train.selective_scan_step_.default(*arguments, dt_softplus, A_is_log), state
        return torch.ops.mamba_train.selective_scan_step.default(*arguments, dt_softplus, A_is_log)
    if in_place:
        return _reference_(*arguments, dt_softplus, A_is_log), state
    return _reference(*arguments, dt_softplus, A_is_log)


def _reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
) -> tuple[Tensor, Tensor]:
    """The step in plain PyTorch, which autograd can follow."""
    dtype = compute_dtype(x)
    x_wide = x.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    rate = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    decay = torch.exp(delta.unsqueeze(-1) * rate)
    driven = (delta * x_wide).unsqueeze(-1) * B.to(dtype).unsqueeze(1)
    new_state = torch.addcmul(driven, decay, state.to(dtype))
    y = torch.matmul(new_state, C.to(dtype).unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = torch.addcmul(y, x_wide, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), new_state


def _reference_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
) -> Tensor:
    y, new_state = _reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log)
    state.copy_(narrowed(new_state, state.dtype))
    return y


# Operators for CUDA devices only: elsewhere, and where gradients are wanted, the plain functions are faster.
_op = operator("mamba_train::selective_scan_step")(_reference)
on_cuda(_op, step_launch.step, lambda state, x, *_: triton_unsupported(x))
_op_ = operator("mamba_train::selective_scan_step_", mutates_args=("state",))(_reference_)
on_cuda(_op_, step_launch.step_, lambda state, x, *_: triton_unsupported(x))


@_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log):
    return x.new_empty(x.shape), x.new_empty(state.shape, dtype=compute_dtype(x))


@_op_.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log):
    return x.new_empty(x.shape)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    name = "selective_scan_step"
    check_tensor(name, "x", x, [("batch", None), ("channel", None)])
    batch, channels = x.shape
    check_tensor(name, "A", A, [("channel", channels), ("state", None)])
    states = A.shape[1]
    check_tensor(name, "state", state, [("batch", batch), ("channel", channels), ("state", states)])
    check_tensor(name, "dt", dt, [("batch", batch), ("channel", channels)])
    check_tensor(name, "B", B, [("batch", batch), ("state", states)])
    check_tensor(name, "C", C, [("batch", batch), ("state", states)])
    for label, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_tensor(name, label, vector, [("channel", channels)])
    if z is not None:
        check_tensor(name, "z", z, [("batch", batch), ("channel", channels)])
    floating = {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_floating(name, **floating)
    check_same_device(name, "x", **floating)
