"""A decoded token of Mamba-1 by the operators that it is made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d_step
from kernels.selective_scan import selective_scan_step


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
    """The same by the operators that it is made of, for any batch on any device."""
    rank, states = dt_proj_weight.shape[1], A_log.shape[1]
    x, _ = causal_conv1d_step(conv_state, x, conv_weight, conv_bias, activation="silu", in_place=True)
    dt, B, C = F.linear(x, x_proj_weight).split([rank, states, states], dim=-1)
    dt = F.linear(dt, dt_proj_weight)
    y, _ = selective_scan_step(scan_state, x, dt, A_log, B, C, D, z, dt_bias, A_is_log=True, in_place=True)
    return y
