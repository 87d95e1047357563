"""A decoded token of many sequences of Mamba-1 on CUDA devices: what lies between the two large matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode.launch import _pdl, _power_of_two_from

PIECE = 32  # outputs of the projection that a program has at once


class Launch(NamedTuple):
    """Sequences, channels and warps of a program of the two large kernels."""

    batch: int = 16
    project: int = 128
    project_warps: int = 8
    scan: int = 32
    scan_warps: int = 8


LAUNCH = Launch()


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
            *(conv_state, x, conv_weight, conv_bias, weight, mixed, parts, batch, channels, outputs, x.stride(0)),
            WIDTH=conv_weight.shape[1],
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.project,
            OUTPUTS=PIECE,
            PIECES=-(-outputs // PIECE),
            num_warps=LAUNCH.project_warps,
            **_pdl(x),
        )
        sum_kernel[(-(-projected.numel() // 128),)](
            *(parts, projected, splits, projected.numel()),
            SPLITS=_power_of_two_from(splits),
            BLOCK=128,
            num_warps=4,
            **_pdl(x),
        )
        dt_scan_kernel[(-(-channels // LAUNCH.scan), groups)](
            *(state, mixed, z, projected, dt_weight, dt_bias, A_log, D, y, batch, channels, rank, states, z.stride(0)),
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.scan,
            RANK=max(16, _power_of_two_from(rank)),
            STATES=_power_of_two_from(states),
            num_warps=LAUNCH.scan_warps,
            **_pdl(x),
        )
    return y
