"""One decode step of the SSD operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_floating, check_same_device, check_tensor, compute_dtype, needs_gradient
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
) -> tuple[Tensor, Tensor]:
    """Advance `state` by one position; the same as `ssd` on a sequence of length 1.

    Shapes: state (batch, head, head_dim, state) fp32; x, z (batch, head, head_dim); dt (batch, head); A, dt_bias
    (head); B, C (batch, group, state); D (head) or (head, head_dim). Returns y (batch, head, head_dim) in the dtype
    of x and the new state in fp32 (fp64 for fp64 x); `state` itself is not changed. Raises ValueError naming the
    argument whose shape does not fit.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    arguments = (state, x, dt, A, B, C, D, z, dt_bias)
    if x.is_cuda and not needs_gradient(*arguments):
        return torch.ops.mamba_train.ssd_step.default(*arguments, dt_softplus, *dt_limit)
    return _reference(*arguments, dt_softplus, *dt_limit)


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
) -> tuple[Tensor, Tensor]:
    """The step in plain PyTorch, which autograd can follow."""
    dtype = compute_dtype(x)
    x_wide = x.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)
    per_group = x.shape[1] // B.shape[1]
    B_heads, C_heads = (v.to(dtype).repeat_interleave(per_group, dim=1) for v in (B, C))
    decay = torch.exp(delta * A.to(dtype))[..., None, None]
    driven = (delta.unsqueeze(-1) * x_wide).unsqueeze(-1) * B_heads.unsqueeze(2)
    new_state = torch.addcmul(driven, decay, state.to(dtype))
    y = torch.matmul(new_state, C_heads.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = torch.addcmul(y, x_wide, (D if D.dim() == 2 else D.unsqueeze(-1)).to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), new_state


# An operator for CUDA devices only: elsewhere, and where gradients are wanted, the plain functions are faster.
_op = torch.library.custom_op("mamba_train::ssd_step", _reference, mutates_args=())
on_cuda(_op, step_launch.step, lambda state, x, *_: triton_unsupported(x))


@_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max):
    return x.new_empty(x.shape), x.new_empty(state.shape, dtype=compute_dtype(x))


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
