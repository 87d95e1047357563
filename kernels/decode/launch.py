"""A decoded token on CUDA devices: outputs and launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import early_start, processors, triton_unsupported

MAX_BATCH = 2  # sequences; for more, tensor cores are faster
GREEDY_BLOCK = 8192  # logits that a program looks at, at once
MAX_PIECES = 8  # of a row of a matrix, which is held in pieces whose sizes are powers of two


class Launch(NamedTuple):
    """How a kernel divides its work.

    tile_bytes: of the matrix that a program of `linear` holds at once, at most; programs: of `linear`, at least that
    many for each multiprocessor; resident: about how many of them run at once there; tiles: that a program has one
    after the other, at most; ahead_bytes: of the matrix after this one that are fetched into the L2 cache; prefetch:
    whether later tiles are, too; once: whether the cache may forget a matrix at once; project, scan: channels of a
    program of `conv_project` and `dt_scan`; ssd: rows of a head.
    """

    tile_bytes: int = 16 * 1024
    programs: int = 2
    resident: int = 4
    tiles: int = 4
    ahead_bytes: int = 16 * 2**20
    prefetch: bool = True
    once: bool = False
    warps: int = 4
    project: int = 128
    scan: int = 64
    ssd: int = 16


LAUNCH = Launch()


def supports(x: Tensor) -> bool:
    """Whether the kernels can run on activations like `x`."""
    return x.is_cuda and triton_unsupported(x) is None


def holds(size: int) -> bool:
    """Whether a program of `linear` can hold rows of `size` channels, of one group of a norm."""
    return size // _power_of_two_in(size) <= MAX_PIECES


def linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    groups: int = 1,
    return_sum: bool = False,
    conv_state: Tensor | None = None,
    conv_input: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """norm((x + residual) · silu(z)) · weightᵀ, and with `return_sum` x + residual in fp32.

    Shapes: x, z (batch, channel), residual fp32; weight (output, channel); norm_weight (channel), None: no norm, which
    is taken over `groups` of channels. conv_state (batch, width - 1, c) takes in conv_input (batch, c) on the way.
    ahead: a matrix that is needed next.
    """
    from kernels.decode.triton_kernels import linear_kernel

    batch, size = x.shape
    outputs = len(weight)
    y = x.new_empty((batch, outputs))
    total = torch.empty((batch, size), dtype=torch.float32, device=x.device) if return_sum else None
    rows = _rows(outputs, size * weight.element_size(), processors(x.device.index) if x.is_cuda else 1, LAUNCH)
    tiles, programs = _tiles(outputs, rows, processors(x.device.index) if x.is_cuda else 1, LAUNCH)
    line = 128 // weight.element_size()
    ahead_size = 0 if ahead is None else min(ahead.numel(), LAUNCH.ahead_bytes // ahead.element_size())
    width, conv_channels = (2, 0) if conv_state is None else (conv_state.shape[1] + 1, conv_state.shape[2])
    with torch.cuda.device_of(x):
        linear_kernel[(programs,)](
            *(x, residual, z, norm_weight, weight, y, total, conv_state, conv_input),
            *(ahead if ahead_size else None, outputs, eps, x.stride(0), 0 if z is None else z.stride(0), conv_channels),
            *(0 if conv_input is None else conv_input.stride(0), ahead_size),
            BATCH=batch,
            SIZE=size,
            PIECE=_power_of_two_in(size // groups),
            GROUPS=groups,
            ROWS=rows,
            TILES=tiles,
            LINES=_power_of_two_from(rows * size // line) if LAUNCH.prefetch else 0,
            AHEAD=_power_of_two_from(-(-ahead_size // (line * programs))),
            ONCE=LAUNCH.once,
            WIDTH=width,
            SHIFTED=_power_of_two_from(-(-conv_channels // programs)),
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return y, total


def conv_project(
    conv_state: Tensor, x: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba-1: silu(convolution of x), and its projection in parts (batch, part, output), fp32, to be summed.

    Shapes: conv_state (batch, width - 1, channel), overwritten; x (batch, channel); conv_weight (channel, width);
    weight (output, channel).
    """
    from kernels.decode.triton_kernels import conv_project_kernel

    (batch, channels), outputs = x.shape, len(weight)
    mixed = x.new_empty((batch, channels))
    programs = -(-channels // LAUNCH.project)
    parts = torch.empty((batch, programs, outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_project_kernel[(programs,)](
            *(conv_state, x, conv_weight, conv_bias, weight, mixed, parts, channels, outputs, x.stride(0)),
            BATCH=batch,
            WIDTH=conv_weight.shape[1],
            CHANNELS=LAUNCH.project,
            OUTPUTS=_power_of_two_from(outputs),
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return mixed, parts


def dt_scan(
    state: Tensor, x: Tensor, z: Tensor, parts: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> Tensor:
    """Mamba-1: y (batch, channel) of a step of the selective scan, gated, from what `conv_project` returned.

    Shapes: state (batch, channel, state), overwritten; z (batch, channel); dt_weight (channel, rank); A_log (channel,
    state); dt_bias, D (channel).
    """
    from kernels.decode.triton_kernels import dt_scan_kernel

    batch, channels, states = state.shape
    rank, splits = dt_weight.shape[1], parts.shape[1]
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        dt_scan_kernel[(-(-channels // LAUNCH.scan),)](
            *(state, x, z, parts, dt_weight, dt_bias, A_log, D, y, channels, rank, states, splits, z.stride(0)),
            BATCH=batch,
            CHANNELS=LAUNCH.scan,
            RANK=_power_of_two_from(rank),
            STATES=_power_of_two_from(states),
            SPLITS=_power_of_two_from(splits),
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return y


def conv_ssd(
    state: Tensor,
    conv_state: Tensor,
    x: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """Mamba-2: y (batch, d_inner) of convolution and SSD step; `linear` after it has to advance conv_state.

    Shapes: state (batch, head, head_dim, state), overwritten; conv_state (batch, width - 1, channel); x (batch,
    channel), what the convolution gets: heads, then B and C of each group; dt (batch, head); A_log, D, dt_bias (head).
    """
    from kernels.decode.triton_kernels import conv_ssd_kernel

    batch, heads, head_dim, states = state.shape
    y = x.new_empty((batch, heads * head_dim))
    rows = min(LAUNCH.ssd, _power_of_two_from(head_dim))
    groups = (x.shape[1] - heads * head_dim) // (2 * states)
    with torch.cuda.device_of(x):
        conv_ssd_kernel[(heads, -(-head_dim // rows), batch)](
            *(state, conv_state, x, dt, conv_weight, conv_bias, A_log, D, dt_bias, y),
            *(heads, head_dim, states, groups, x.stride(0), dt.stride(0)),
            WIDTH=conv_weight.shape[1],
            ROWS=rows,
            STATES=_power_of_two_from(states),
            num_warps=LAUNCH.warps,
            **early_start(x),
        )
    return y


def greedy(logits: Tensor, classes: int, refused: int) -> Tensor:
    """The first of the largest among the first `classes` logits of each row; `refused` where one is not finite.

    Returns int64 (rows,). Shapes: logits (rows, at least `classes`), side by side in a row.
    """
    from kernels.decode.triton_kernels import greedy_kernel

    token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        greedy_kernel[(len(logits),)](
            *(logits, token, classes, logits.stride(0)), REFUSED=refused, BLOCK=GREEDY_BLOCK, num_warps=16
        )
    return token


@functools.cache
def _rows(outputs: int, row_bytes: int, multiprocessors: int, launch: Launch) -> int:
    """Outputs of a program of `linear`: few enough for registers, and for all multiprocessors to have some."""
    rows = 16
    while rows > 1 and (rows * row_bytes > launch.tile_bytes or outputs < rows * launch.programs * multiprocessors):
        rows //= 2
    return rows


@functools.cache
def _tiles(outputs: int, rows: int, multiprocessors: int, launch: Launch) -> tuple[int, int]:
    """How many tiles of `rows` outputs a program of `linear` has one after the other; how many programs there are."""
    tiles = -(-outputs // rows)
    each = max(1, min(launch.tiles, -(-tiles // (launch.resident * multiprocessors))))
    return each, -(-tiles // each)


def _power_of_two_in(size: int) -> int:
    """The largest that divides `size`."""
    return size & -size


def _power_of_two_from(size: int) -> int:
    """The smallest that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
