"""One decode step of the SSD operator: plain PyTorch, and Triton on NVIDIA GPUs."""

from __future__ import annotations

import math

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
from kernels.ssd import step_launch
from kernels.ssd.arguments import check_groups, check_skip


def ssd_step(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    A_is_log: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance `state` by one position; the same as `ssd` on a sequence of length 1.

    Shapes: state (batch, head, head_dim, state) fp32; x, z (batch, head, head_dim); dt (batch, head); A, dt_bias
    (head); B, C (batch, group, state); D (head) or (head, head_dim). Returns y (batch, head, head_dim) in the dtype
    of x and the new state in fp32 (fp64 for fp64 x). A_is_log: `A` holds log(-A), as models store it. in_place:
    `state`, of any floating dtype, becomes the new state, without gradients; otherwise it is not changed. Raises
    ValueError naming the argument that does not fit.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    arguments = (*tensors, dt_softplus, *dt_limit, A_is_log)
    if in_place:
        check_in_place("ssd_step", *tensors)
    if x.is_cuda and not needs_gradient(*tensors):
        if in_place:
            return torch.ops.mamba_train.ssd_step_.default(*arguments), state
        return torch.ops.mamba_train.ssd_step.default(*arguments)
    if in_place:
        return _reference_(*arguments), state
    return _reference(*arguments)


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
    dt_min: float,
    dt_max: float,
    A_is_log: bool,
) -> tuple[Tensor, Tensor]:
    """The step in plain PyTorch, which autograd can follow."""
    dtype = compute_dtype(x)
    x_wide = x.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)
    per_group = x.shape[1] // B.shape[1]
    B_heads, C_heads = (v.to(dtype).repeat_interleave(per_group, dim=1) for v in (B, C))
    rate = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    decay = torch.exp(delta * rate)[..., None, None]
    driven = (delta.unsqueeze(-1) * x_wide).unsqueeze(-1) * B_heads.unsqueeze(2)
    new_state = torch.addcmul(driven, decay, state.to(dtype))
    y = torch.matmul(new_state, C_heads.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = torch.addcmul(y, x_wide, (D if D.dim() == 2 else D.unsqueeze(-1)).to(dtype))
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
    dt_min: float,
    dt_max: float,
    A_is_log: bool,
) -> Tensor:
    y, new_state = _reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, A_is_log)
    state.copy_(narrowed(new_state, state.dtype))
    return y


# Operators for CUDA devices only: elsewhere, and where gradients are wanted, the plain functions are faster.
_op = torch.library.custom_op("mamba_train::ssd_step", _reference, mutates_args=())
on_cuda(_op, step_launch.step, lambda state, x, *_: triton_unsupported(x))
_op_ = torch.library.custom_op("mamba_train::ssd_step_", _reference_, mutates_args=("state",))
on_cuda(_op_, step_launch.step_, lambda state, x, *_: triton_unsupported(x))


@_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, A_is_log):
    return x.new_empty(x.shape), x.new_empty(state.shape, dtype=compute_dtype(x))


@_op_.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, A_is_log):
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
    name = "ssd_step"
    check_tensor(name, "x", x, [("batch", None), ("head", None), ("head_dim", None)])
    batch, heads, head_dim = x.shape
    check_tensor(name, "dt", dt, [("batch", batch), ("head", heads)])
    check_tensor(name, "A", A, [("head", heads)])
    check_tensor(name, "B", B, [("batch", batch), ("group", None), ("state", None)])
    check_groups(name, B, heads, axis=1)
    check_tensor(name, "C", C, [("batch", batch), ("group", B.shape[1]), ("state", B.shape[2])])
    expected = [("batch", batch), ("head", heads), ("head_dim", head_dim), ("state", B.shape[2])]
    check_tensor(name, "state", state, expected)
    check_skip(name, D, heads, head_dim)
    if dt_bias is not None:
        check_tensor(name, "dt_bias", dt_bias, [("head", heads)])
    if z is not None:
        check_tensor(name, "z", z, [("batch", batch), ("head", heads), ("head_dim", head_dim)])
    floating = {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_floating(name, **floating)
    check_same_device(name, "x", **floating)
