"""One decode step of the SSD operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_floating, check_in_place, check_same_device, check_tensor, compute_dtype
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
    of x and the new state in fp32 (fp64 for fp64 x). A_is_log: `A` holds log(-A), as models store it. in_place: `state`
    becomes the new state, without gradients; otherwise it is not changed. Raises ValueError naming the argument that
    does not fit.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    if in_place:
        check_in_place("ssd_step", state, compute_dtype(x), state, x, dt, A, B, C, D, z, dt_bias)
    dtype = compute_dtype(x)
    x_wide = x.to(dtype)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(*dt_limit)
    per_group = x.shape[1] // B.shape[1]
    B_heads, C_heads = (v.to(dtype).repeat_interleave(per_group, dim=1) for v in (B, C))
    rate = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    decay = torch.exp(delta * rate)[..., None, None]
    driven = (delta.unsqueeze(-1) * x_wide).unsqueeze(-1) * B_heads.unsqueeze(2)
    out = state if in_place else None
    new_state = torch.addcmul(driven, decay, state.to(dtype), out=out)
    y = torch.matmul(new_state, C_heads.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = torch.addcmul(y, x_wide, (D if D.dim() == 2 else D.unsqueeze(-1)).to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), new_state


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
