"""The decode step of the scan on CUDA devices: outputs and the launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import early_start


class Launch(NamedTuple):
    """How a program of the kernel is made: states that it holds at least, and its warps."""

    elements: int
    warps: int


LAUNCH = Launch(elements=512, warps=4)


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
    A_is_log: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `mamba_train::selective_scan_step`: y and the new state."""
    new_state = x.new_empty((*x.shape, A.shape[1]), dtype=torch.float32)
    return _launch(state, new_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log), new_state


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
    A_is_log: bool,
) -> Tensor:
    """The operator `mamba_train::selective_scan_step_`: y, while `state` becomes the new one."""
    return _launch(state, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log)


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
    A_is_log: bool,
) -> Tensor:
    from kernels.selective_scan.step_kernel import step_kernel

    (batch, channels), states = x.shape, A.shape[1]
    y = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y
    padded_states = 1 << max(0, states - 1).bit_length()
    per_program = max(1, LAUNCH.elements // padded_states)
    D, dt_bias = (None if vector is None else vector.contiguous() for vector in (D, dt_bias))
    with torch.cuda.device_of(x):
        step_kernel[(batch, -(-channels // per_program))](
            *(state, x, dt, A, B, C, D, z, dt_bias, y, new_state),
            *(channels, states),
            *(*state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride()),
            *((0, 0) if z is None else z.stride()),
            SOFTPLUS=dt_softplus,
            A_IS_LOG=A_is_log,
            CHANNELS=per_program,
            STATES=padded_states,
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return y
