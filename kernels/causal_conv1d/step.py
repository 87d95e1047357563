"""One decode step of the convolution: plain PyTorch, and Triton on NVIDIA GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import compute_dtype, needs_gradient
from kernels.dispatch import early_start, on_cuda, triton_unsupported
from kernels.operator import operator

MAX_WIDTH = 16  # of the kernel, which is unrolled over the width


class Launch(NamedTuple):
    """Channels of a program of the kernel, and its warps."""

    channels: int
    warps: int


LAUNCH = Launch(channels=256, warps=4)


def advance(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    """y and the new state; the arguments are those of `causal_conv1d_step`, already checked."""
    if x.is_cuda and not needs_gradient(state, x, weight, bias):
        if in_place:
            return torch.ops.mamba_train.causal_conv1d_step_.default(state, x, weight, bias, silu), state
        return torch.ops.mamba_train.causal_conv1d_step.default(state, x, weight, bias, silu)
    if in_place:
        return _reference_(state, x, weight, bias, silu), state
    return _reference(state, x, weight, bias, silu)


def _reference(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The step in plain PyTorch, which autograd can follow."""
    dtype = compute_dtype(x)
    window = torch.cat([state.to(dtype), x.to(dtype).unsqueeze(1)], dim=1)
    y = (window * weight.to(dtype).t()).sum(dim=1)
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), window[:, 1:].to(state.dtype).contiguous()


def _reference_(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y, new_state = _reference(state, x, weight, bias, silu)
    state.copy_(new_state)
    return y


def launch(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The operator on a CUDA device."""
    new_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    return _launch(state, new_state, x, weight, bias, silu), new_state


def launch_(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The operator on a CUDA device that changes its state."""
    return _launch(state, state, x, weight, bias, silu)


def _launch(state: Tensor, new_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from kernels.causal_conv1d.step_kernel import step_kernel

    (batch, channels), width = x.shape, weight.shape[1]
    y = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        step_kernel[(batch, -(-channels // LAUNCH.channels))](
            *(state, x, weight, bias, y, new_state),
            *(channels, *state.stride(), *x.stride(), *weight.stride()),
            WIDTH=width,
            SILU=silu,
            CHANNELS=LAUNCH.channels,
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return y


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot run on these inputs, None when it can."""
    if weight.shape[1] > MAX_WIDTH:
        return f"a filter of width {weight.shape[1]} is wider than {MAX_WIDTH}"
    return triton_unsupported(x)


# Operators for CUDA devices only: elsewhere, and where gradients are wanted, the plain functions are faster.
_op = operator("mamba_train::causal_conv1d_step")(_reference)
on_cuda(_op, launch, lambda state, x, weight, *_: unsupported(x, weight))
_op_ = operator("mamba_train::causal_conv1d_step_", mutates_args=("state",))(_reference_)
on_cuda(_op_, launch_, lambda state, x, weight, *_: unsupported(x, weight))


@_op.register_fake
def _(state, x, weight, bias, silu):
    return x.new_empty(x.shape), state.new_empty(state.shape)


@_op_.register_fake
def _(state, x, weight, bias, silu):
    return x.new_empty(x.shape)
