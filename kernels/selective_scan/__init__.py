"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2), and its decode step."""

from __future__ import annotations

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
from kernels.selective_scan import dispatch  # noqa: F401  registers torch.ops.mamba_train.selective_scan
from kernels.selective_scan.reference import selective_scan_op
from kernels.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]


@overload
def selective_scan(
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
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def selective_scan(
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
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
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
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run h[t] = exp(Δ[t]·A)·h[t-1] + Δ[t]·x[t]·B[t] and return y[t] = (C[t]·h[t] + D·x[t])·silu(z[t]).

    Δ is `softplus(dt + dt_bias)`, or `dt + dt_bias` with `dt_softplus=False`.

    Shapes: x, dt, z (batch, length, channel); A (channel, state), negative; B, C (batch, length, state);
    D, dt_bias (channel); seq_idx (batch, length) int32, the number of the document of each position, where any
    change resets the state to 0; initial_state (batch, channel, state), which belongs to the document at
    position 0. Any strides. Arithmetic is fp32, or fp64 when x is fp64.

    Returns y (batch, length, channel) in the dtype of x, and with `return_final_state=True` also the state after
    the last position, (batch, channel, state) in fp32. Both are differentiable; the backward is deterministic.
    A, D and dt_bias reach the operator in the dtype they are given in.

    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", equations 2a, 2b, 4.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state)
    y, final_state, _, _ = selective_scan_op(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        seq_idx,
        initial_state,
        needs_gradient(x, dt, A, B, C, D, z, dt_bias, initial_state),
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
    name = "selective_scan"
    check_tensor(name, "x", x, [("batch", None), ("length", None), ("channel", None)])
    check_not_empty(name, "x", x)
    batch, length, channels = x.shape
    check_tensor(name, "A", A, [("channel", channels), ("state", None)])
    check_not_empty(name, "A", A)
    states = A.shape[1]
    rows = [("batch", batch), ("length", length)]
    check_tensor(name, "dt", dt, [*rows, ("channel", channels)])
    check_tensor(name, "B", B, [*rows, ("state", states)])
    check_tensor(name, "C", C, [*rows, ("state", states)])
    for label, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check_tensor(name, label, vector, [("channel", channels)])
    if z is not None:
        check_tensor(name, "z", z, [*rows, ("channel", channels)])
    if seq_idx is not None:
        check_seq_idx(name, seq_idx, batch, length)
    if initial_state is not None:
        expected = [("batch", batch), ("channel", channels), ("state", states)]
        check_tensor(name, "initial_state", initial_state, expected)
    floating = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    floating["initial_state"] = initial_state
    check_floating(name, **floating)
    check_same_device(name, "x", **floating, seq_idx=seq_idx)
