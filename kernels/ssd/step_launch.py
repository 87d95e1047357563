"""The decode step of SSD on CUDA devices: outputs and the launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import early_start


class Launch(NamedTuple):
    """How a program of the kernel is made: states that it holds at least, and its warps."""

    elements: int
    warps: int


LAUNCH = Launch(elements=4096, warps=4)
UNALIGNED = Launch(elements=1024, warps=4)


def launch_for(*strides: int) -> Launch:
    """Where rows do not begin at multiples of 16 elements, loads are narrow, and their addresses take the registers."""
    return LAUNCH if all(stride % 16 == 0 for stride in strides) else UNALIGNED


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
    A_is_log: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `mamba_train::ssd_step`: y and the new state."""
    new_state = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    return _launch(state, new_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, A_is_log), new_state


def step_(
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
    A_is_log: bool,
) -> Tensor:
    """The operator `mamba_train::ssd_step_`: y, while `state` becomes the new one."""
    return _launch(state, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, A_is_log)


def _launch(
    state: Tensor,
    new_state: Tensor,
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
    A_is_log: bool,
) -> Tensor:
    from kernels.ssd.step_kernel import step_kernel

    batch, heads, head_dim = x.shape
    groups, states = B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    padded_states = 1 << max(0, states - 1).bit_length()
    launch = launch_for(*state.stride()[:-1])
    rows = min(max(1, launch.elements // padded_states), 1 << (head_dim - 1).bit_length())
    A, dt_bias = A.contiguous(), None if dt_bias is None else dt_bias.contiguous()
    D_strides = (0, 0) if D is None else (*D.stride(), 0)[:2]
    with torch.cuda.device_of(x):
        step_kernel[(batch * heads, -(-head_dim // rows))](
            *(state, x, dt, A, B, C, D, z, dt_bias, y, new_state),
            *(dt_min, dt_max, heads, head_dim, states, heads // groups),
            *(*state.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride(), *D_strides),
            *((0, 0, 0) if z is None else z.stride()),
            SOFTPLUS=dt_softplus,
            A_IS_LOG=A_is_log,
            ROWS=rows,
            STATES=padded_states,
            num_warps=launch.warps,
            **early_start(x),
        )
    return y
