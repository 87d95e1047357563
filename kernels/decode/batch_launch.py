"""A decoded token of many sequences on CUDA devices: outputs and launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decode.launch import _power_of_two_from
from kernels.dispatch import early_start, has_large_shared_memory

SMALL = 2**22  # elements of a matrix that has too few rows for large tiles


class Launch(NamedTuple):
    """How the kernels divide their work.

    batch, scan, scan_warps: sequences, channels and warps of a program of `dt_scan_many`; norm_warps, gated_norm_warps;
    tile, inputs, stages, product_warps: outputs of a program of `product`, inputs that it takes at a time, and how many
    of those are on their way; parts: of a product in parts.
    """

    batch: int = 16
    scan: int = 32
    scan_warps: int = 4
    norm_warps: int = 4
    gated_norm_warps: int = 8
    tile: int = 64
    inputs: int = 128
    stages: int = 5
    product_warps: int = 4
    parts: int = 2


LAUNCH = Launch()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, (batch, output); x (batch, channel), weight (output, channel)."""
    return _product(x, weight, 1)[0]


def product_in_parts(x: Tensor, weight: Tensor, parts: int | None = None) -> Tensor:
    """x · weightᵀ as (part, batch, output), to be summed: so all multiprocessors have something to read.

    Shapes: x (batch, channel), weight (output, channel). Several parts are shares of the channels, in fp32.
    """
    return _product(x, weight, LAUNCH.parts if parts is None else parts)


def library_product_in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """`product_in_parts` by cuBLAS."""
    parts = LAUNCH.parts
    if x.shape[1] % (8 * parts) or not x.is_cuda:
        return F.linear(x, weight).unsqueeze(0)
    of_x = x.view(len(x), parts, -1).transpose(0, 1)
    of_weight = weight.view(len(weight), parts, -1).permute(1, 2, 0)
    return torch.bmm(of_x, of_weight, out_dtype=torch.float32)


def _product(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    from kernels.decode.batch_kernels import linear_kernel

    (batch, size), outputs = x.shape, len(weight)
    if size % (LAUNCH.inputs * parts) or (x.is_cuda and not has_large_shared_memory(x.device.index)):
        return F.linear(x, weight).unsqueeze(0)
    y = torch.empty((parts, batch, outputs), dtype=torch.float32 if parts > 1 else x.dtype, device=x.device)
    sequences = 64 if batch > 32 else max(16, _power_of_two_from(batch))
    tile = LAUNCH.tile if weight.numel() > SMALL else LAUNCH.tile // 2
    programs = -(-outputs // tile)
    with torch.cuda.device_of(x):
        linear_kernel[(programs, parts, -(-batch // sequences))](
            *(
                x,
                weight,
                y,
                batch,
                outputs,
                x.stride(0),
                *_shares(weight, programs * parts * 32 * LAUNCH.product_warps),
            ),
            SIZE=size,
            BATCH=sequences,
            OUTPUTS=tile,
            INPUTS=LAUNCH.inputs,
            SPLITS=parts,
            STAGES=LAUNCH.stages,
            THREADS=32 * LAUNCH.product_warps,
            num_warps=LAUNCH.product_warps,
            **early_start(x),
        )
    return y


def _shares(matrix: Tensor, threads: int) -> tuple[int, int]:
    """Bytes that are fetched, and those of each of so many threads: multiples of 16; 0 where no fetch may begin."""
    size = 0 if matrix.data_ptr() % 16 else matrix.nbytes // 16 * 16
    return size, -(-size // (16 * threads)) * 16


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
            num_warps=LAUNCH.norm_warps,
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
            num_warps=LAUNCH.gated_norm_warps,
            **early_start(x),
        )
    return y


def dt_scan_many(
    state: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """y (batch, channel): the projection of x to Δ, B and C, and a step of the scan, gated, in bf16 or fp16.

    Shapes: state (batch, channel, state), overwritten; x, z (batch, channel); weight (rank + 2 · state, channel);
    dt_weight (channel, rank); A_log (channel, state); dt_bias, D (channel).
    """
    from kernels.decode.batch_kernels import dt_scan_kernel, sum_kernel

    batch, channels, states = state.shape
    rank = dt_weight.shape[1]
    parts = product_in_parts(x, weight, max(1, channels // LAUNCH.inputs))
    y, projected = torch.empty_like(x), x.new_empty((batch, len(weight)))
    with torch.cuda.device_of(x):
        sum_kernel[(-(-projected.numel() // 128),)](
            *(parts, projected, len(parts), projected.numel()),
            SPLITS=_power_of_two_from(len(parts)),
            BLOCK=128,
            num_warps=4,
            **early_start(x),
        )
        dt_scan_kernel[(-(-channels // LAUNCH.scan), -(-batch // LAUNCH.batch))](
            *(state, x, z, projected, dt_weight, dt_bias, A_log, D, y, batch, channels, rank, states, z.stride(0)),
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.scan,
            RANK=max(16, _power_of_two_from(rank)),
            STATES=_power_of_two_from(states),
            num_warps=LAUNCH.scan_warps,
            **early_start(x),
        )
    return y
