"""The convolution's operators on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, early_start, processors, triton_unsupported
from kernels.launcher import Launch, remembered, sum_launch

WIDTHS = (2, 3, 4)
MAX_WIDTH = max(WIDTHS)


class Shape(NamedTuple):
    """How a kernel divides its work."""

    block: int  # channels of a program
    warps: int
    unroll: int  # steps whose inputs are asked for at once
    steps: int  # of a stretch of time, a multiple of `unroll`
    stretches: int = 1  # that follow one another, side by side in the warps of a program
    early: int = 0  # launched before the kernel before has ended
    reduce: int = 1

    @property
    def positions(self) -> int:
        return self.steps * self.stretches

    def owned(self, width: int) -> int:
        return (self.steps - (width - 1)) * self.stretches

    @property
    def constants(self) -> tuple[int | bool, ...]:
        return self.block, self.stretches, self.unroll, self.steps == self.unroll, self.early


# Milliseconds on an H100, bf16, width 4, of (block, warps, unroll, steps), from `--sweep`:
#
#                        (8, 2048, 5120) (1, 131072, 5376) (8, 2048, 1536) (1, 2048, 5120)
#   forward (256, 2, 4, 8)        0.1159            0.9450          0.0385          0.0163
#           (256, 2, 4, 16)       0.1233            0.9946          0.0402          0.0169
#           (256, 1, 4, 16)       0.1226            0.9778
#   backward (128, 1, 4, 164)     0.1912
#            (128, 1, 4, 112)     0.1939                            0.0647
#            (128, 1, 4, 48)                                                        0.0299
#
# Of small tensors, how many times as fast as causal-conv1d, forward and forward + backward:
#
#                    (1, 150, 3000) (1, 501, 4800) (5, 200, 2400) (8, 1256, 288) (1, 1068, 2896) (2, 1892, 1072)
#   (256, 2, 4, 8)            1.387          0.928          0.968          0.913           1.043           1.159
#   (128, 1, 4, 8)            1.395          0.966          1.035          1.073           1.121           1.150
#   (128, 1, 4, 16)                          1.178          1.251          1.142           1.295
#   backward (128, 1, 4, 16)  1.047          0.977          1.064          0.899           1.146           0.992
#            (128, 1, 4, 24)  0.910          0.930          1.015          1.066           1.128           1.088
#            (128, 1, 4, 32)  0.812          0.853          0.939          1.054           1.104           1.065
#
# (the latter with (256, 2, 4, 8) forward, and (512, 4, 4, 8) at 288 channels; 16 programs fit on a multiprocessor).


def forward_shape(batch: int, length: int, channels: int, processors: int) -> Shape:
    """The forward kernel: programs so short and many that the last ones leave little of the GPU idle.

    A small tensor takes as long as programs take to start: few and narrow ones, that all run at once. Otherwise one
    takes up to 512 channels: two, of which the second has few, would take longer to start than to run.
    """
    for steps, at_once in (8, 8), (16, 16):  # programs of a multiprocessor
        if batch * -(-length // steps) * -(-channels // 128) <= at_once * processors:
            return Shape(128, 1, unroll=4, steps=steps)
    block, warps = (512, 4) if 256 < channels <= 512 else (256, 2)
    return Shape(block, warps, unroll=4, steps=8)


def backward_shape(batch: int, length: int, channels: int, processors: int, with_more: bool) -> Shape:
    """The backward kernel: rounds of programs that fill the GPU, as few as give a program about 200 steps at most.

    Each has sums to leave, and some steps to walk for its neighbour, so that short ones cost more. with_more: three
    inputs, which need 202 registers where a lane has four channels and 96 where it has two.
    """
    block, warps, at_once = (256, 4, 5) if with_more else (128, 1, 16)  # at once: on a multiprocessor
    unroll, most, least = 4, 192, 32 if with_more else 16
    sequences = batch * -(-channels // block)
    places = processors * at_once
    rounds = max(1, -(-sequences * length // (places * most)))
    chunks = max(1, rounds * places // sequences)
    steps = -(-length // chunks) + MAX_WIDTH - 1
    return Shape(block, warps, unroll, steps=max(least, -(-steps // unroll) * unroll))


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
    at_once = processors(x.device.index) if x.is_cuda else 1
    shape = forward_shape(batch, length, channels, at_once)._replace(early=early_start(x)["PDL"])
    launch = _forward_launch(x.shape, strides, width, silu, shape)
    with torch.cuda.device_of(x):
        launch(x, weight.contiguous(), bias, seq_idx, initial_state, y, final_state)
    return y, final_state


@remembered
def _forward_launch(x_shape: torch.Size, strides: tuple[int, ...], width: int, silu: bool, shape: Shape) -> Launch:
    """strides: of x and seq_idx, along batch and length."""
    from kernels.causal_conv1d.triton_kernels import forward_kernel

    batch, length, channels = x_shape
    chunks = -(-length // shape.positions)
    align = alignment(channels, *strides[:2])
    return Launch(
        forward_kernel,
        (batch * chunks * -(-channels // shape.block), 1),
        (*(s // align for s in strides[:2]), *strides[2:], length, channels // align, chunks, shape.steps),
        (width, silu, align, *shape.constants),
        shape.warps,
        bool(shape.early),
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
    shape = backward_shape(batch, length, channels, at_once, more is not None)
    kinds = width + (bias is not None)
    chunks = -(-length // shape.owned(width))
    chunks *= 1 if shape.reduce else shape.stretches
    parts = torch.empty((batch * chunks, kinds, channels), dtype=torch.float32, device=x.device)
    strides = [stride for t in (y_grad, x, x_grad) for stride in t.stride()[:2]]
    strides += (0, 0) if seq_idx is None else seq_idx.stride()
    launch = _backward_launch(x.shape, tuple(strides), width, silu, shape)
    with torch.cuda.device_of(x):
        launch(
            *(y_grad, _contiguous(more), final_grad, x, weight.contiguous(), bias, seq_idx, initial_state),
            *(x_grad, state_grad, parts),
        )
        sum_launch(batch * chunks, channels, kinds)(parts, weight_grad, None if bias is None else bias_grad)
    return x_grad, weight_grad, bias_grad, state_grad


@remembered
def _backward_launch(x_shape: torch.Size, strides: tuple[int, ...], width: int, silu: bool, shape: Shape) -> Launch:
    """strides: of the gradient of y, x, that of x, and seq_idx, along batch and length."""
    from kernels.causal_conv1d.triton_kernels import backward_kernel

    batch, length, channels = x_shape
    chunks = -(-length // shape.owned(width))
    align = alignment(channels, *strides[:6])
    return Launch(
        backward_kernel,
        (batch * chunks * -(-channels // shape.block), 1),
        (*(s // align for s in strides[:6]), *strides[6:], length, channels // align, chunks, shape.steps),
        (width, silu, align, *shape.constants, shape.reduce),
        shape.warps,
        bool(shape.early),
    )


def _unit(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring channels side by side: itself, or a copy where they are not."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
