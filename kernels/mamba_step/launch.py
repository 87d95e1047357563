"""The two kernels of a decoded token on CUDA devices: outputs and launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_BATCH = 8  # beyond, matrix products that read the weights once for all sequences are faster; a guess, not measured
MAX_WIDTH = 16  # of the convolution, over which the kernel is unrolled
MAX_SUM = 512  # of Δ's rank and the states, which programs hold whole


class Launch(NamedTuple):
    """Channels of a program of the kernel, and its warps."""

    channels: int
    warps: int


# First guesses, compared with no others.
PROJECT = Launch(channels=64, warps=8)
SCAN = Launch(channels=32, warps=4)


def fits(x: Tensor, A_log: Tensor, conv_weight: Tensor, dt_proj_weight: Tensor) -> bool:
    """Whether the kernels are made for these sizes."""
    sums = dt_proj_weight.shape[1] + 2 * A_log.shape[1]
    return 0 < len(x) <= MAX_BATCH and sums <= MAX_SUM and conv_weight.shape[1] <= MAX_WIDTH


def step_(
    conv_state: Tensor,
    scan_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """The operator `mamba_train::mamba_step_`."""
    from kernels.mamba_step.triton_kernels import project_kernel, scan_kernel

    (batch, channels), (rank, states) = x.shape, (dt_proj_weight.shape[1], A_log.shape[1])
    outputs, splits = len(x_proj_weight), -(-channels // PROJECT.channels)
    mixed, y = x.new_empty((batch, channels)), x.new_empty((batch, channels))
    parts = torch.empty((batch, splits, outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        project_kernel[(batch, splits)](
            *(conv_state, x, conv_weight.contiguous(), conv_bias.contiguous()),
            *(x_proj_weight.contiguous(), mixed, parts),
            *(channels, outputs, *x.stride()),
            WIDTH=conv_weight.shape[1],
            CHANNELS=PROJECT.channels,
            OUTPUTS=_power_of_two(outputs),
            num_warps=PROJECT.warps,
        )
        scan_kernel[(batch, -(-channels // SCAN.channels))](
            *(scan_state, mixed, z, parts, dt_proj_weight.contiguous(), dt_bias.contiguous()),
            *(A_log.contiguous(), D.contiguous(), y),
            *(channels, rank, states, splits, *z.stride()),
            CHANNELS=SCAN.channels,
            RANK=_power_of_two(rank),
            STATES=_power_of_two(states),
            SPLITS=_power_of_two(splits),
            num_warps=SCAN.warps,
        )
    return y


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
