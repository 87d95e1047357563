"""State-space duality: the scan of Mamba-2 (arXiv 2405.21060, section 6), and its decode step."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from kernels.checks import (
    check_floating,
    check_not_empty,
    check_same_device,
    check_seq_idx,
    check_tensor,
    needs_gradient,
    once_for_each_kind,
)
from kernels.ssd import dispatch  # noqa: F401  registers torch.ops.mamba_train.ssd
from kernels.ssd.arguments import check_groups, check_skip
from kernels.ssd.reference import ssd_op
from kernels.ssd.step import ssd_step

__all__ = ["ssd", "ssd_step"]

DtLimit = tuple[float, float]


@overload
def ssd(
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
    dt_limit: DtLimit = (0.0, math.inf),
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def ssd(
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
    dt_limit: DtLimit = (0.0, math.inf),
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def ssd(
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
    dt_limit: DtLimit = (0.0, math.inf),
    chunk_size: int = 256,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run h[t] = exp(Δ[t]·A)·h[t-1] + Δ[t]·x[t]·B[t]ᵀ in each head; return y[t] = (h[t]·C[t] + D·x[t])·silu(z[t]).

    Δ is `softplus(dt + dt_bias)`, or `dt + dt_bias` with `dt_softplus=False`, clamped to `dt_limit`.

    Shapes: x, z (batch, length, head, head_dim); dt (batch, length, head); A (head), negative; B, C (batch, length,
    group, state), each group serving head/group consecutive heads; D (head) or (head, head_dim); dt_bias (head);
    seq_idx (batch, length) int32, the number of the document of each position, where any change resets the state to
    0; initial_state (batch, head, head_dim, state), which belongs to the document at position 0. Any strides.
    Arithmetic is fp32, or fp64 when x is fp64. `chunk_size` positions are computed at once, as matrix products; it
    changes memory and speed, and the result only by rounding.

    Returns y in the shape and dtype of x, and with `return_final_state=True` also the state after the last position,
    (batch, head, head_dim, state) in fp32. Both are differentiable; the backward is deterministic. A, D and dt_bias
    reach the operator in the dtype they are given in.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    Source: "Transformers are SSMs", arXiv 2405.21060, section 6 (block decomposition) and equation 2.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state)
    low, high = (float(limit) for limit in dt_limit)
    if not low <= high:
        raise ValueError(f"ssd: dt_limit is {dt_limit}, expected (low, high) with low <= high")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, expected at least 1")
    y, final_state, _, _ = ssd_op(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        low,
        high,
        min(chunk_size, x.shape[1]),
        seq_idx,
        initial_state,
        needs_gradient(x, dt, A, B, C, D, z, dt_bias, initial_state),
        return_final_state,
    )
    return (y, final_state) if return_final_state else y


@once_for_each_kind
def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    name = "ssd"
    check_tensor(name, "x", x, [("batch", None), ("length", None), ("head", None), ("head_dim", None)])
    check_not_empty(name, "x", x)
    batch, length, heads, head_dim = x.shape
    rows = [("batch", batch), ("length", length)]
    check_tensor(name, "dt", dt, [*rows, ("head", heads)])
    check_tensor(name, "A", A, [("head", heads)])
    check_tensor(name, "B", B, [*rows, ("group", None), ("state", None)])
    check_groups(name, B, heads, axis=2)
    check_not_empty(name, "B", B)
    groups, states = B.shape[2:]
    check_tensor(name, "C", C, [*rows, ("group", groups), ("state", states)])
    check_skip(name, D, heads, head_dim)
    if dt_bias is not None:
        check_tensor(name, "dt_bias", dt_bias, [("head", heads)])
    if z is not None:
        check_tensor(name, "z", z, [*rows, ("head", heads), ("head_dim", head_dim)])
    if seq_idx is not None:
        check_seq_idx(name, seq_idx, batch, length)
    if initial_state is not None:
        expected = [("batch", batch), ("head", heads), ("head_dim", head_dim), ("state", states)]
        check_tensor(name, "initial_state", initial_state, expected)
    floating = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    floating["initial_state"] = initial_state
    check_floating(name, **floating)
    check_same_device(name, "x", **floating, seq_idx=seq_idx)
