"""The convolution's operators on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, early_start, processors, triton_unsupported
from kernels.launcher import SUM_WARPS, Launch, device_of, remembered

WIDTHS = (2, 3, 4)
MAX_WIDTH = max(WIDTHS)


class Shape(NamedTuple):
    """How a kernel divides its work."""

    block: int  # channels of a program
    warps: int
    unroll: int  # positions of a stretch whose inputs are asked for at once
    steps: int  # of a stretch, a multiple of `unroll`; in the backward with those that it walks for the next one
    stretches: int = 1  # of a program; where there are several, each is in warps of its own and has `unroll` steps


# How many times as fast as causal-conv1d on an H100, bf16, width 4, with all kernels starting early: forward + backward
# with other backwards (block, stretches, steps of each in one round of loads; or the walk that `backward_shape` takes
# otherwise), and programs of the first for each multiprocessor:
#
#                     (2, 328,   (1, 150,  (1, 1247,   (1, 501,   (5, 200,  (8, 1256,  (2, 1892,  (1, 1369,   (8, 300,
#                         520)      3000)      1600)      4800)      2400)       288)      1072)      3160)      2000)
#   (64, 4, 24)          1.439      1.606      1.304      1.318      1.202      1.547      1.314      1.265      1.297
#   (64, 4, 20)          1.529      1.480      1.259      1.275      1.260      1.458      1.255      1.213      1.206
#   (64, 4, 16)          1.617      1.666      1.302      1.289      1.248      1.344      1.240      1.262      1.271
#   a walk               1.285      1.330      1.147      1.188      1.163      1.268      1.290      1.297      1.346
#   programs               0.5        0.7        2.8        3.4        4.3        4.5        5.9        6.4        7.8
#
# The forward, with these backwards, at (1, 501, 4800), (5, 200, 2400), (8, 2048, 1536), (8, 2048, 5120):
#   (128, 4, 8)       1.323     1.309     1.371     1.337        (256, 2, 8)    -     1.349     1.379     1.337
#   (128, 1, 8)       1.164     1.191     1.373     1.337        (128, 2, 8)    -     1.338     1.372     1.338
FORWARD = Shape(128, 4, unroll=8, steps=8, stretches=4)
BACKWARD_ONCE = Shape(64, 4, unroll=24, steps=24, stretches=4)


def backward_shape(
    batch: int, length: int, channels: int, processors: int, with_more: bool = False, plain: bool = False
) -> Shape:
    """The backward kernel: small programs with one round of loads while they are few, else rounds that fill the GPU.

    The latter are as few as give a program about 200 steps at most: each has sums to leave, and some steps to walk for
    its neighbour, so that short ones cost more. with_more: three inputs, which need 202 registers where a lane has four
    channels and 96 where it has two. plain: no document boundaries, no states, no `more`; with them the first would be
    compiled for longer than small calls gain.
    """
    if plain:
        owned = BACKWARD_ONCE.stretches * (BACKWARD_ONCE.steps - MAX_WIDTH + 1)
        if batch * -(-length // owned) * -(-channels // BACKWARD_ONCE.block) <= 6 * processors:
            return BACKWARD_ONCE
    block, warps, at_once = (256, 4, 5) if with_more else (128, 1, 16)  # at once: on a multiprocessor
    unroll, most, least = 4, 192, 32 if with_more else 16
    sequences = batch * -(-channels // block)
    places = processors * at_once
    rounds = max(1, -(-sequences * length // (places * most)))
    chunks = max(1, rounds * places // sequences)
    steps = -(-length // chunks) + MAX_WIDTH - 1
    return Shape(block, warps, unroll, steps=max(least, -(-steps // unroll) * unroll))


def sum_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that a program of the sum adds up at once: few and many where there are many programs.

    With (32, 64) forward + backward are 1.265 times as fast as the official ones at 54 rows of 5,120 columns, with
    (128, 16) 1.186 times; at 62 of 320 it is 1.716 and 1.909.
    """
    return (32, 64) if columns >= 40 * rows else (128, 16)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot run on these inputs, None when they can."""
    if weight.shape[1] not in WIDTHS:
        return f"a filter of width {weight.shape[1]}; there are kernels for 2, 3 and 4"
    return triton_unsupported(x)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator's forward: y and the final state."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    x, initial_state, bias = _unit(x), _contiguous(initial_state), _contiguous(bias)
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    final_state = torch.empty((batch, width - 1, channels), dtype=x.dtype, device=x.device)
    strides = (*x.stride()[:2], *((0, 0) if seq_idx is None else seq_idx.stride()))
    launch = _forward_launch(x.shape, strides, width, silu, early_start(x)["PDL"], FORWARD)
    with device_of(x):
        launch(x, weight.contiguous(), bias, seq_idx, initial_state, y, final_state)
    return y, final_state


@remembered
def _forward_launch(
    x_shape: torch.Size, strides: tuple[int, ...], width: int, silu: bool, early: bool, shape: Shape
) -> Launch:
    """strides: of x and seq_idx, along batch and length."""
    from kernels.causal_conv1d.triton_kernels import forward_kernel

    batch, length, channels = x_shape
    chunks = -(-length // (shape.steps * shape.stretches))
    align = alignment(channels, *strides[:2])
    return Launch(
        forward_kernel,
        (batch * chunks * -(-channels // shape.block), 1),
        (*(s // align for s in strides[:2]), *strides[2:], length, channels // align, chunks),
        (width, silu, align, early, shape.block, shape.steps, shape.stretches),
        shape.warps,
        early,
    )


def backward(
    y_grad: Tensor | None,
    final_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    x_grad: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, weight, bias, initial state; empty for an absent one.

    x_grad: where the first one goes, with neighbouring channels side by side. more: what there is to add to y_grad.
    """
    (batch, length, channels), width = x.shape, weight.shape[1]
    y_grad = torch.zeros_like(x) if y_grad is None else y_grad
    x, y_grad = _unit(x), _unit(y_grad)
    initial_state, bias, final_grad = _contiguous(initial_state), _contiguous(bias), _contiguous(final_grad)
    if x_grad is None:
        x_grad = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    state_grad = x.new_empty((0,) if initial_state is None else initial_state.shape)
    weight_grad = weight.new_empty(weight.shape)
    bias_grad = x.new_empty((0,)) if bias is None else torch.empty_like(bias)
    at_once = processors(x.device.index) if x.is_cuda else 1
    plain = more is None and final_grad is None and seq_idx is None and initial_state is None
    shape = backward_shape(batch, length, channels, at_once, more is not None, plain)
    early = early_start(x)["PDL"]
    kinds = width + (bias is not None)
    chunks = _backward_chunks(length, width, shape)
    parts = torch.empty((batch * chunks * shape.stretches, kinds, channels), dtype=torch.float32, device=x.device)
    strides = [stride for t in (y_grad, x, x_grad) for stride in t.stride()[:2]]
    strides += (0, 0) if seq_idx is None else seq_idx.stride()
    launch = _backward_launch(x.shape, tuple(strides), width, silu, early, shape)
    with device_of(x):
        launch(
            *(y_grad, _contiguous(more), final_grad, x, weight.contiguous(), bias, seq_idx, initial_state),
            *(x_grad, state_grad, parts),
        )
        _sum_launch(len(parts), channels, kinds, early)(parts, weight_grad, None if bias is None else bias_grad)
    return x_grad, weight_grad, bias_grad, state_grad


def _backward_chunks(length: int, width: int, shape: Shape) -> int:
    """Programs along a sequence."""
    return -(-length // (shape.stretches * (shape.steps - (width - 1))))


@remembered
def _backward_launch(
    x_shape: torch.Size, strides: tuple[int, ...], width: int, silu: bool, early: bool, shape: Shape
) -> Launch:
    """strides: of the gradient of y, x, that of x, and seq_idx, along batch and length."""
    from kernels.causal_conv1d.triton_backward import backward_kernel

    batch, length, channels = x_shape
    chunks = _backward_chunks(length, width, shape)
    align = alignment(channels, *strides[:6])
    return Launch(
        backward_kernel,
        (batch * chunks * -(-channels // shape.block), 1),
        (*(s // align for s in strides[:6]), *strides[6:], length, channels // align, chunks, shape.steps),
        (width, silu, align, early, shape.block, shape.unroll, shape.stretches),
        shape.warps,
        early,
    )


@remembered
def _sum_launch(rows: int, columns: int, kinds: int, early: bool) -> Launch:
    from kernels.sum_parts import sum_parts, sum_parts_early

    at_once, block = sum_shape(rows, columns)
    kernel = sum_parts_early if early else sum_parts
    return Launch(kernel, (-(-columns // block), kinds), (rows, columns), (kinds, at_once, block), SUM_WARPS, early)


def _unit(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring channels side by side: itself, or a copy where they are not."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
