"""The convolution's operators on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, early_start, processors, triton_unsupported

WIDTHS = (2, 3, 4)
MAX_WIDTH = max(WIDTHS)
FEW = 24_000  # elements for each multiprocessor, up to which a tensor is small


class Shape(NamedTuple):
    """How a kernel divides its work."""

    block: int  # channels of a program
    warps: int
    unroll: int  # steps whose inputs are asked for at once
    steps: int  # of a program, a multiple of `unroll`
    stretches: int = 1  # of so many steps that a program of the backward walks down side by side


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
# Of small tensors, microseconds of forward + backward beside causal-conv1d's (last line):
#
#                       (1, 300, 256) (1, 1834, 1240) (8, 1256, 288) (1, 3101, 944) (2, 601, 2992) (2, 1892, 1072)
#   (128, 1, 4, 32)                        17.7            21.4           18.5           21.0           23.8
#   4 x (64, 2, 4, 16)       9.7           15.6            20.9           18.1           23.3           23.9
#   causal-conv1d           11.1           19.5            23.6           21.0           23.2           26.2


def forward_shape(channels: int) -> Shape:
    """The forward kernel: programs so short and many that the last ones leave little of the GPU idle.

    One takes up to 512 channels: two, of which the second has few, would take longer to start than to run.
    """
    block, warps = (512, 4) if 256 < channels <= 512 else (256, 2)
    return Shape(block, warps, unroll=4, steps=8)


def backward_shape(batch: int, length: int, channels: int, processors: int, with_more: bool) -> Shape:
    """The backward kernel: rounds of programs that fill the GPU, as few as give a program about 200 steps at most.

    Each has sums to leave, and some steps to walk for its neighbour, so that short ones cost more. A small tensor takes
    as long as a walk, which waits for memory again and again: there a program walks four short stretches side by side.
    with_more: three inputs, which need 202 registers where a lane has four channels and 96 where it has two.
    """
    if not with_more and batch * length * channels <= FEW * processors:
        return Shape(block=64, warps=2, unroll=4, steps=16, stretches=4)
    block, warps, at_once = (256, 4, 5) if with_more else (128, 1, 16)  # at once: on a multiprocessor
    unroll, most, least = 4, 192, 32
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
    from kernels.causal_conv1d.triton_kernels import forward_kernel

    (batch, length, channels), width = x.shape, weight.shape[1]
    x, initial_state, bias = _unit(x), _contiguous(initial_state), _contiguous(bias)
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    final_state = torch.empty((batch, width - 1, channels), dtype=x.dtype, device=x.device)
    shape = forward_shape(channels)
    chunks = -(-length // shape.steps)
    align = alignment(channels, x.stride(0), x.stride(1))
    with torch.cuda.device_of(x):
        forward_kernel[(batch * chunks * -(-channels // shape.block),)](
            *(x, weight.contiguous(), bias, seq_idx, initial_state, y, final_state),
            *(x.stride(0) // align, x.stride(1) // align),
            *((0, 0) if seq_idx is None else seq_idx.stride()),
            *(length, channels // align, chunks, shape.steps),
            *(width, silu, align, shape.block, shape.unroll),
            num_warps=shape.warps,
            **early_start(x),
        )
    return y, final_state


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
    from kernels.causal_conv1d.triton_kernels import backward_kernel
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

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
    chunks = -(-length // (shape.stretches * (shape.steps - (width - 1))))
    parts = torch.empty((batch * chunks, kinds, channels), dtype=torch.float32, device=x.device)
    strides = [stride for t in (y_grad, x, x_grad) for stride in t.stride()[:2]]
    align = alignment(channels, *strides)
    with torch.cuda.device_of(x):
        backward_kernel[(batch * chunks * -(-channels // shape.block),)](
            *(y_grad, _contiguous(more), final_grad, x, weight.contiguous(), bias, seq_idx, initial_state),
            *(x_grad, state_grad, parts),
            *(stride // align for stride in strides),
            *((0, 0) if seq_idx is None else seq_idx.stride()),
            *(length, channels // align, chunks, shape.steps),
            *(width, silu, align, shape.block, shape.unroll, shape.stretches),
            num_warps=shape.warps,
        )
        sum_parts[(-(-channels // COLUMNS), kinds)](
            *(parts, weight_grad, None if bias is None else bias_grad, batch * chunks, channels),
            *(kinds, ROWS, COLUMNS),
        )
    return x_grad, weight_grad, bias_grad, state_grad


def _unit(tensor: Tensor) -> Tensor:
    """The tensor with neighbouring channels side by side: itself, or a copy where they are not."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
