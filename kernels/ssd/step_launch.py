"""The decode step of SSD on CUDA devices: outputs and the launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """How a program of the kernel is made: states that it holds at most, unless of one channel, and its warps."""

    elements: int
    warps: int


LAUNCH = Launch(elements=2048, warps=4)  # a first guess


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """The operator `mamba_train::ssd_step`: y and the new state."""
    from kernels.ssd.step_kernel import step_kernel

    (batch, heads, head_dim), (groups, states) = x.shape, B.shape[1:]
    y = x.new_empty(x.shape)
    new_state = x.new_empty((batch, heads, head_dim, states), dtype=torch.float32)
    if y.numel() == 0:
        return y, new_state
    padded_states = 1 << max(0, states - 1).bit_length()
    channels = max(1, min(LAUNCH.elements // padded_states, 1 << max(0, head_dim - 1).bit_length()))
    A, D, dt_bias = (None if vector is None else vector.contiguous() for vector in (A, D, dt_bias))  # type: ignore[assignment]
    with torch.cuda.device_of(x):
        step_kernel[(batch * heads, -(-head_dim // channels))](
            *(state, x, dt, A, B, C, D, z, dt_bias, y, new_state),
            *(heads, heads // groups, head_dim, states),
            *(*state.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride()),
            *((0, 0, 0) if z is None else z.stride()),
            *(dt_min, dt_max),
            SOFTPLUS=dt_softplus,
            WIDE_SKIP=D is not None and D.dim() == 2,
            CHANNELS=channels,
            STATES=padded_states,
            num_warps=LAUNCH.warps,
        )
    return y, new_state
