"""A decoded token of many sequences of Mamba-1 on CUDA devices: what lies between the two large matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode.launch import _power_of_two_from, _power_of_two_in
from kernels.dispatch import early_start

SMALL = 2**22  # elements of a matrix that has too few rows for large tiles
PIECE = 32  # outputs of the projection that a program has at once


class Launch(NamedTuple):
    """How the kernels divide their work.

    batch: sequences of a program of `conv_scan`; project, scan and their warps: channels and warps of its two large
    kernels. own_products: not by cuBLAS; outputs, inputs: of a tile of a product, in `stages` buffers; prefetch,
    ahead_bytes: what is fetched into the L2 cache of a matrix before it is needed, and of the next matrix.
    """

    batch: int = 16
    project: int = 64
    project_warps: int = 4
    scan: int = 32
    scan_warps: int = 8
    own_products: bool = True
    outputs: int = 64
    inputs: int = 128
    stages: int = 4
    product_warps: int = 4
    prefetch: bool = True
    ahead_bytes: int = 16 * 2**20


LAUNCH = Launch()


def product(x: Tensor, weight: Tensor, in_parts: bool = False, ahead: Tensor | None = None) -> Tensor:
    """x · weightᵀ, (batch, output), in the dtype of x; with `in_parts` (part, batch, output), in fp32, to be summed.

    Shapes: x (batch, channel), weight (output, channel). ahead: a matrix that is needed next.
    """
    from kernels.decode.batch_kernels import linear_kernel

    (batch, size), outputs = x.shape, len(weight)
    tile = LAUNCH.outputs if weight.numel() > SMALL else LAUNCH.outputs // 2
    if not LAUNCH.own_products or size % LAUNCH.inputs or x.dtype == torch.float32:
        y = torch.nn.functional.linear(x, weight)
        return y.unsqueeze(0) if in_parts else y
    splits, sequences = 1, 64 if batch > 32 else max(16, _power_of_two_from(batch))
    while in_parts and splits < 8 and size % (2 * splits * LAUNCH.inputs) == 0 and outputs * splits < 100 * tile:
        splits *= 2
    y = torch.empty((splits, batch, outputs), dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    line, programs = 128 // weight.element_size(), -(-outputs // tile)
    with torch.cuda.device_of(x):
        linear_kernel[(programs, splits, -(-batch // sequences))](
            *(x, weight, y, *_ahead(ahead), batch, outputs, x.stride(0), _ahead_size(ahead)),
            SIZE=size,
            BATCH=sequences,
            OUTPUTS=tile,
            INPUTS=LAUNCH.inputs,
            SPLITS=splits,
            STAGES=LAUNCH.stages,
            LINES=_power_of_two_in(size // splits // line) if LAUNCH.prefetch else 0,
            AHEAD=_ahead_lines(ahead, programs * splits),
            num_warps=LAUNCH.product_warps,
            **early_start(x),
        )
    return y if in_parts else y[0]


def normed(parts: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """norm(total) in the dtype of weight, and total = sum of parts + residual in fp32.

    Shapes: parts (part, batch, channel), residual (batch, channel) fp32, weight (channel).
    """
    from kernels.decode.batch_kernels import norm_kernel

    splits, batch, size = parts.shape
    total = torch.empty((batch, size), dtype=torch.float32, device=parts.device)
    y = torch.empty((batch, size), dtype=weight.dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        norm_kernel[(batch,)](
            *(parts, residual, weight, y, total, batch, size, eps),
            SPLITS=splits,
            SIZE=_power_of_two_from(size),
            num_warps=4,
            **early_start(parts),
        )
    return y, total


def gated_normed(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """norm(x · silu(z)), over each of `groups` of channels, in the dtype of x.

    Shapes: x contiguous, z (batch, channel), weight (channel).
    """
    from kernels.decode.batch_kernels import gated_norm_kernel

    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        gated_norm_kernel[(len(x), groups)](
            *(x, z, weight, y, x.shape[1] // groups, eps, z.stride(0)),
            SIZE=_power_of_two_from(x.shape[1] // groups),
            num_warps=8,
            **early_start(x),
        )
    return y


def conv_scan(
    conv_state: Tensor,
    state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    ahead: Tensor | None = None,
) -> Tensor:
    """y (batch, channel): convolution, projection to Δ, B and C, and a step of the scan, gated, in bf16 or fp16.

    Shapes: conv_state (batch, width - 1, channel) and state (batch, channel, state), both overwritten; x, z (batch,
    channel); conv_weight (channel, width); weight (rank + 2 · state, channel); dt_weight (channel, rank); A_log
    (channel, state); dt_bias, D (channel).
    """
    from kernels.decode.batch_kernels import conv_project_kernel, dt_scan_kernel, sum_kernel

    batch, channels, states = state.shape
    outputs, rank = len(weight), dt_weight.shape[1]
    mixed, y = (x.new_empty((batch, channels)) for _ in range(2))
    projected = x.new_empty((batch, outputs))
    splits, groups = -(-channels // LAUNCH.project), -(-batch // LAUNCH.batch)
    parts = torch.empty((splits, batch, outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_project_kernel[(splits, groups)](
            *(conv_state, x, conv_weight, conv_bias, weight, mixed, parts, *_ahead(ahead)),
            *(batch, channels, outputs, x.stride(0), _ahead_size(ahead)),
            WIDTH=conv_weight.shape[1],
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.project,
            OUTPUTS=PIECE,
            PIECES=-(-outputs // PIECE),
            AHEAD=_ahead_lines(ahead, splits * groups),
            num_warps=LAUNCH.project_warps,
            **early_start(x),
        )
        sum_kernel[(-(-projected.numel() // 128),)](
            *(parts, projected, splits, projected.numel()),
            SPLITS=_power_of_two_from(splits),
            BLOCK=128,
            num_warps=4,
            **early_start(x),
        )
        dt_scan_kernel[(-(-channels // LAUNCH.scan), groups)](
            *(state, mixed, z, projected, dt_weight, dt_bias, A_log, D, y, batch, channels, rank, states, z.stride(0)),
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.scan,
            RANK=max(16, _power_of_two_from(rank)),
            STATES=_power_of_two_from(states),
            num_warps=LAUNCH.scan_warps,
            **early_start(x),
        )
    return y


def _ahead(matrix: Tensor | None) -> tuple[Tensor | None]:
    return (matrix if LAUNCH.ahead_bytes else None,)


def _ahead_size(matrix: Tensor | None) -> int:
    """Elements that are fetched ahead."""
    return 0 if matrix is None else min(matrix.numel(), LAUNCH.ahead_bytes // matrix.element_size())


def _ahead_lines(matrix: Tensor | None, programs: int) -> int:
    """Times 128 bytes that each of so many programs has to fetch."""
    if matrix is None:
        return 0
    return _power_of_two_from(-(-_ahead_size(matrix) * matrix.element_size() // (128 * programs)))
