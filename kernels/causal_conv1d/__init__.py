"""Depthwise causal convolution along the length, and its decode step."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from kernels.causal_conv1d import dispatch  # noqa: F401  registers torch.ops.mamba_train.causal_conv1d
from kernels.causal_conv1d.reference import causal_conv1d_op
from kernels.causal_conv1d.step import advance
from kernels.checks import (
    check_floating,
    check_in_place,
    check_not_empty,
    check_same_device,
    check_seq_idx,
    check_tensor,
    once_for_each_kind,
)

__all__ = ["causal_conv1d", "causal_conv1d_step"]

Activation = Literal["silu"] | None


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y[t] = activation(bias + sum over j < width of weight[:, width-1-j]·x[t-j]), one filter per channel.

    Shapes: x (batch, length, channel), any strides; weight (channel, width), any width of at least 1; bias
    (channel); seq_idx (batch, length) int32, the number of the document of each position, where any change hides
    what came before; initial_state (batch, width-1, channel), the inputs before position 0, which belong to the
    document at position 0 (zeros when absent). Arithmetic is fp32, or fp64 when x is fp64.

    Returns y in the dtype of x, and with `return_final_state=True` also the last width-1 inputs,
    (batch, width-1, channel) in the dtype of x, zero where the last document had not begun. Both are
    differentiable; the backward is deterministic. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, bias, seq_idx, initial_state)
    _check_activation("causal_conv1d", activation)
    y, final_state = causal_conv1d_op(x, weight, bias, activation == "silu", seq_idx, initial_state)
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance the convolution by one position; the same as `causal_conv1d` on a sequence of length 1.

    Shapes: state (batch, width-1, channel), the inputs before this one; x (batch, channel); weight (channel, width);
    bias (channel). Returns y (batch, channel) in the dtype of x and the new state in the dtype of `state`.
    in_place: `state` becomes the new state, without gradients; otherwise it is not changed.
    Raises ValueError naming the argument that does not fit.
    """
    name = "causal_conv1d_step"
    check_tensor(name, "x", x, [("batch", None), ("channel", None)])
    batch, channels = x.shape
    _check_filter(name, weight, bias, channels)
    _check_activation(name, activation)
    expected = [("batch", batch), ("width-1", weight.shape[1] - 1), ("channel", channels)]
    check_tensor(name, "state", state, expected)
    check_floating(name, state=state, x=x, weight=weight, bias=bias)
    check_same_device(name, "x", state=state, x=x, weight=weight, bias=bias)
    if in_place:
        check_in_place(name, state, x, weight, bias)
    return advance(state, x, weight, bias, activation == "silu", in_place)


@once_for_each_kind
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_state: Tensor | None
) -> None:
    name = "causal_conv1d"
    check_tensor(name, "x", x, [("batch", None), ("length", None), ("channel", None)])
    check_not_empty(name, "x", x)
    batch, length, channels = x.shape
    _check_filter(name, weight, bias, channels)
    if seq_idx is not None:
        check_seq_idx(name, seq_idx, batch, length)
    if initial_state is not None:
        expected = [("batch", batch), ("width-1", weight.shape[1] - 1), ("channel", channels)]
        check_tensor(name, "initial_state", initial_state, expected)
    floating = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    check_floating(name, **floating)
    check_same_device(name, "x", **floating, seq_idx=seq_idx)


def _check_filter(name: str, weight: Tensor, bias: Tensor | None, channels: int) -> None:
    check_tensor(name, "weight", weight, [("channel", channels), ("width", None)])
    if weight.shape[1] < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected a width of at least 1")
    if bias is not None:
        check_tensor(name, "bias", bias, [("channel", channels)])


def _check_activation(name: str, activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"{name}: activation is {activation!r}, expected None or 'silu'")
