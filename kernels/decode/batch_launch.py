"""A decoded token of many sequences on CUDA devices: outputs and launches of what lies between two large products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decode import launch
from kernels.decode.launch import _power_of_two_from
from kernels.dispatch import early_start

PIECE = 32  # outputs of Mamba-1's projection that a program has at once
SHIFTED = 1024  # channels of a convolution's state that a program moves on


class Launch(NamedTuple):
    """How the kernels divide their work.

    batch: sequences of a program of `conv_scan`'s kernels; project, scan: channels; *_warps: of each kernel. parts: that
    `product_in_parts` has; first_bytes, rest_bytes: of the next layer's matrix that are fetched ahead before and
    after the last product of a layer; out: whether that product's own is.
    """

    batch: int = 16
    project: int = 64
    project_warps: int = 4
    hold: bool = True
    scan: int = 32
    scan_warps: int = 4
    norm_warps: int = 4
    gated_norm_warps: int = 8
    parts: int = 2
    first_bytes: int = 0
    rest_bytes: int = 0
    out: bool = False
    fuse_conv: bool = False
    conv_alone: bool = False
    own_in: bool = True
    own_out: bool = True
    inputs: int = 128
    stages: int = 5
    tile: int = 64
    product_warps: int = 4
    fetch_own: bool = True


LAUNCH = Launch()


def split_ahead(matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What is to be fetched of the matrix that a layer begins with, before the last product of the layer before, and after."""
    flat, size = matrix.view(-1), matrix.element_size()
    first = flat[: LAUNCH.first_bytes // size]
    rest = flat[len(first) : len(first) + LAUNCH.rest_bytes // size]
    return first, rest


def product(x: Tensor, weight: Tensor, own: bool) -> Tensor:
    """x · weightᵀ, (batch, output); x (batch, channel), weight (output, channel)."""
    if own and LAUNCH.own_in and x.is_cuda and x.shape[1] % LAUNCH.inputs == 0:
        return _own_product(x, weight, 1)[0]
    return F.linear(x, weight)


def product_in_parts(x: Tensor, weight: Tensor, own: bool) -> Tensor:
    """x · weightᵀ as (part, batch, output), to be summed; x (batch, channel), weight (output, channel).

    Parts are shares of the channels, so that all multiprocessors have something to read, in fp32.
    """
    parts = LAUNCH.parts
    if own and LAUNCH.own_out and x.is_cuda and x.shape[1] % (LAUNCH.inputs * parts) == 0:
        return _own_product(x, weight, parts)
    if parts == 1 or x.shape[1] % (8 * parts) or not x.is_cuda:
        return F.linear(x, weight).unsqueeze(0)
    of_x = x.view(len(x), parts, -1).transpose(0, 1)
    of_weight = weight.view(len(weight), parts, -1).permute(1, 2, 0)
    return torch.bmm(of_x, of_weight, out_dtype=torch.float32)


def _own_product(x: Tensor, weight: Tensor, splits: int) -> Tensor:
    from kernels.decode.batch_kernels import linear_kernel

    (batch, size), outputs = x.shape, len(weight)
    sequences = 64 if batch > 32 else max(16, _power_of_two_from(batch))
    y = torch.empty((splits, batch, outputs), dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    tile = LAUNCH.tile if weight.numel() > 2**22 else LAUNCH.tile // 2
    programs = -(-outputs // tile)
    shares = _shares(weight, programs * splits, LAUNCH.product_warps) if LAUNCH.fetch_own else (0, 0)
    with torch.cuda.device_of(x):
        linear_kernel[(programs, splits, -(-batch // sequences))](
            *(x, weight, y, batch, outputs, x.stride(0), *shares),
            SIZE=size,
            BATCH=sequences,
            OUTPUTS=tile,
            INPUTS=LAUNCH.inputs,
            SPLITS=splits,
            STAGES=LAUNCH.stages,
            THREADS=32 * LAUNCH.product_warps,
            num_warps=LAUNCH.product_warps,
            **early_start(x),
        )
    return y


def normed(
    parts: Tensor, residual: Tensor | None, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(total) in the dtype of weight, and total = sum of parts + residual in fp32.

    Shapes: parts (part, batch, channel), residual (batch, channel) fp32, weight (channel). ahead: a matrix, or a part
    of it, that is needed next.
    """
    from kernels.decode.batch_kernels import norm_kernel

    splits, batch, size = parts.shape
    total = torch.empty((batch, size), dtype=torch.float32, device=parts.device)
    y = torch.empty((batch, size), dtype=weight.dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        norm_kernel[(batch,)](
            *(
                parts,
                residual,
                weight,
                y,
                total,
                _ahead(ahead),
                batch,
                size,
                eps,
                *_shares(ahead, batch, LAUNCH.norm_warps),
            ),
            SPLITS=splits,
            SIZE=_power_of_two_from(size),
            num_warps=LAUNCH.norm_warps,
            THREADS=32 * LAUNCH.norm_warps,
            **early_start(parts),
        )
    return y, total


def gated_normed(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int,
    conv_state: Tensor | None,
    conv_input: Tensor | None,
    ahead: Tensor | None = None,
    later: Tensor | None = None,
) -> Tensor:
    """norm(x · silu(z)), over each of `groups` of channels, in the dtype of x; conv_state takes in conv_input.

    Shapes: x contiguous, z (batch, channel), weight (channel); conv_state (batch, width - 1, c), conv_input (batch, c).
    """
    from kernels.decode.batch_kernels import gated_norm_kernel

    (batch, channels), (kept, conv_channels) = x.shape, (3, 0) if conv_state is None else conv_state.shape[1:]
    y = torch.empty_like(x)
    programs = groups + -(-conv_channels // SHIFTED)
    with torch.cuda.device_of(x):
        gated_norm_kernel[(batch, programs)](
            *(
                x,
                z,
                weight,
                y,
                conv_state,
                conv_input,
                _ahead(ahead),
                _ahead(later),
                channels // groups,
                groups,
                eps,
                z.stride(0),
            ),
            *(conv_channels, 0 if conv_input is None else conv_input.stride(0)),
            *_shares(ahead, batch * programs, LAUNCH.gated_norm_warps),
            *_shares(later, batch * programs, LAUNCH.gated_norm_warps),
            WIDTH=kept + 1,
            SIZE=_power_of_two_from(channels // groups),
            SHIFTED=SHIFTED,
            num_warps=LAUNCH.gated_norm_warps,
            THREADS=32 * LAUNCH.gated_norm_warps,
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
    later: Tensor | None = None,
) -> Tensor:
    """y (batch, channel): convolution, projection to Δ, B and C, and a step of the scan, gated, in bf16 or fp16.

    Shapes: conv_state (batch, width - 1, channel) and state (batch, channel, state), both overwritten; x, z (batch,
    channel); conv_weight (channel, width); weight (rank + 2 · state, channel); dt_weight (channel, rank); A_log
    (channel, state); dt_bias, D (channel). ahead, later: what the products after this one read.
    """
    from kernels.decode.batch_kernels import conv_project_kernel, dt_scan_kernel, sum_kernel

    batch, channels, states = state.shape
    outputs, rank = len(weight), dt_weight.shape[1]
    mixed, y = (x.new_empty((batch, channels)) for _ in range(2))
    projected = x.new_empty((batch, outputs))
    splits, groups, blocks = -(-channels // LAUNCH.project), -(-batch // LAUNCH.batch), -(-channels // LAUNCH.scan)
    if LAUNCH.conv_alone and channels % LAUNCH.inputs == 0 and x.is_cuda:
        from kernels.causal_conv1d import causal_conv1d_step

        mixed, _ = causal_conv1d_step(conv_state, x, conv_weight, conv_bias, activation="silu", in_place=True)
        splits = channels // LAUNCH.inputs
        parts = _own_product(mixed, weight, splits)
    else:
        parts = torch.empty((splits, batch, outputs), dtype=torch.float32, device=x.device)
        conv_project_kernel[(splits, groups)](
            *(conv_state, x, conv_weight, conv_bias, weight, mixed, parts, _ahead(ahead)),
            *(batch, channels, outputs, x.stride(0)),
            *_shares(ahead, splits * groups, LAUNCH.project_warps),
            WIDTH=conv_weight.shape[1],
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.project,
            OUTPUTS=PIECE,
            PIECES=-(-outputs // PIECE),
            HOLD=LAUNCH.hold,
            num_warps=LAUNCH.project_warps,
            THREADS=32 * LAUNCH.project_warps,
            **early_start(x),
        )
    with torch.cuda.device_of(x):
        sum_kernel[(-(-projected.numel() // 128),)](
            *(parts, projected, splits, projected.numel()),
            SPLITS=_power_of_two_from(splits),
            BLOCK=128,
            num_warps=4,
            **early_start(x),
        )
        dt_scan_kernel[(blocks, groups)](
            *(state, mixed, z, projected, dt_weight, dt_bias, A_log, D, y, _ahead(later)),
            *(batch, channels, rank, states, z.stride(0)),
            *_shares(later, blocks * groups, LAUNCH.scan_warps),
            BATCH=LAUNCH.batch,
            CHANNELS=LAUNCH.scan,
            RANK=max(16, _power_of_two_from(rank)),
            STATES=_power_of_two_from(states),
            STREAM=launch.LAUNCH.stream,
            num_warps=LAUNCH.scan_warps,
            THREADS=32 * LAUNCH.scan_warps,
            **early_start(x),
        )
    return y


def _ahead(matrix: Tensor | None) -> Tensor | None:
    """What is fetched ahead: nothing where it is none, or lies where no fetch may begin."""
    return matrix if _bytes(matrix) else None


def _bytes(matrix: Tensor | None) -> int:
    """How much is fetched ahead."""
    return 0 if matrix is None or matrix.data_ptr() % 16 else matrix.nbytes // 16 * 16


def _shares(ahead: Tensor | None, programs: int, warps: int) -> tuple[int, int]:
    """Its bytes, and those that each thread of so many programs fetches: multiples of 16."""
    size = _bytes(ahead)
    return size, -(-size // (programs * 32 * warps * 16)) * 16
