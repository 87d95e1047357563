"""The operators `mamba_train::selective_scan` and its backward on CUDA devices: checks, buffers, launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.selective_scan.cuda import device, variants
from kernels.selective_scan.cuda.device import unsupported as unsupported


class Outputs(NamedTuple):
    """Gradients of activations, (batch, length, channel): of x and dt contiguous, of z with any strides of rows."""

    x: Tensor
    dt: Tensor
    z: Tensor


def starts_shape(x: Tensor, states: int) -> tuple[int, int, int, int]:
    """Shape of the fp32 states that the forward saves: (batch, tiles, channel, padded states)."""
    tiles = -(-x.shape[1] // variants.tile_steps(states))
    return x.shape[0], tiles, x.shape[2], variants.padded(states)


def fake(x: Tensor, states: int, gated: bool, for_backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, without values; asks nothing of the length, which may be a symbol."""
    final_state = x.new_empty((x.shape[0], x.shape[2], states), dtype=torch.float32)
    starts = x.new_empty(starts_shape(x, states) if for_backward else (0,), dtype=torch.float32)
    ungated = x.new_empty(x.shape if for_backward and gated else (0,))
    return x.new_empty(x.shape), final_state, starts, ungated


# These test before they call: a call of PyTorch that does nothing still takes a microsecond or two.


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _as(tensor, torch.float32).contiguous()


def _activations(*tensors: Tensor | None) -> list[Tensor | None]:
    """Give all activations one dtype and a channel stride of 1: copies only where they have not."""
    dtypes = {t.dtype for t in tensors if t is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    same = [None if t is None else _as(t, dtype) for t in tensors]
    return [t if t is None or t.stride(2) == 1 else t.contiguous() for t in same]


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's forward: y, final state (batch, channel, state) fp32, saved states, y before the gate."""
    y_dtype, (batch, length, channels), states = x.dtype, x.shape, A.shape[1]
    x, dt, B, C, z = _activations(x, dt, B, C, z)  # type: ignore[assignment]
    seq_idx = None if seq_idx is None else seq_idx.int()
    A, D, dt_bias, initial_state = (_fp32(t) for t in (A, D, dt_bias, initial_state))  # type: ignore[assignment]
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if for_backward and z is not None else y.new_empty((0,))
    final_state = x.new_empty((batch, channels, states), dtype=torch.float32)
    starts = x.new_empty(starts_shape(x, states) if for_backward else (0,), dtype=torch.float32)
    if y.numel() == 0:
        return _as(y, y_dtype), final_state, starts, _as(ungated, y_dtype)

    index = x.device.index
    with torch.cuda.device(index):
        dtype, processors = device.DTYPES[x.dtype], device.processors(index)
        variant, segments = variants.forward_plan(states, batch, length, channels, processors)
        chained = variant.source == "chained"
        aligned = device.aligned(channels, variant.vectors(dtype), (x, dt, z))
        if chained:
            aligned = aligned and device.aligned(states, variant.state_vectors(dtype), (B, C))
        kernel = device.kernel(
            f"scan_{variant.source}", index, variant, dtype, z is not None, seq_idx is not None, aligned
        )
        groups = variant.groups(channels)
        inputs = (
            *(argument for tensor in (x, dt, z, B, C) for argument in device.strided(tensor)),
            *(A, D, dt_bias, *device.strided(seq_idx), initial_state),
        )
        outputs = y, ungated if ungated.numel() else None, final_state, starts if for_backward else None
        sizes = length, channels, states, groups
        if chained:
            units = batch * groups
            blocks = min(units, processors * kernel.at_once)
            # Whether a ring has left the state in which one of the next block goes on, where they share a unit.
            ready = torch.zeros(blocks * variant.rings, dtype=torch.int32, device=x.device) if blocks < units else None
            own: tuple[Tensor | int | None, ...] = (*outputs, ready, *sizes, units, blocks, dt_softplus)
        else:
            blocks = batch * segments * groups
            ends, decays = _ends(False, segments, x, dt, None, B, A, dt_bias, dt_softplus, seq_idx)
            own = (ends, decays, *outputs, *sizes, segments, dt_softplus)
        device.launch(kernel, blocks, variant.threads, kernel.shared_bytes, (*inputs, *own))
    return _as(y, y_dtype), final_state, starts, _as(ungated, y_dtype)


def _ends(
    reverse: bool,
    segments: int,
    x: Tensor,
    dt: Tensor,
    z: Tensor | None,
    B: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What all segments but the last make of the state that enters them: see ends.cu, also for what `reverse` changes.

    Returns (batch, segments - 1, channel, padded states) in fp32 twice: the state after a segment is the second times
    the one before it plus the first. None where there is but one segment.
    """
    if segments == 1:
        return None, None
    (batch, length, channels), states = x.shape, A.shape[1]
    variant = variants.ends_variant(states, reverse)
    index, dtype = x.device.index, device.DTYPES[x.dtype]
    aligned = device.aligned(channels, variant.vectors(dtype), (x, dt, z))
    kernel = device.kernel("scan_ends", index, variant, dtype, z is not None, seq_idx is not None, aligned)
    groups = variant.groups(channels)
    shape = (batch, segments - 1, channels, variant.padded_states)
    ends, decays = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    activations = (argument for tensor in (x, dt, z, B) for argument in device.strided(tensor))
    sizes = (length, channels, states, groups, segments, dt_softplus)
    arguments = (*activations, A, dt_bias, *device.strided(seq_idx), ends, decays, *sizes)
    device.launch(kernel, batch * (segments - 1) * groups, variant.threads, kernel.shared_bytes, arguments)
    return ends, decays


def backward(
    y_grad: Tensor | None,
    final_state_grad: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    into: Outputs | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one.

    into: where those of x, dt and z go, in the one dtype that all activations then have.
    """
    given = (x, dt, A, B, C, D, z, dt_bias)
    (batch, length, channels), states = x.shape, A.shape[1]
    y_grad = torch.zeros_like(x) if y_grad is None else y_grad
    saved = ungated if z is not None else None
    x, dt, B, C, z, y_grad, saved = _activations(x, dt, B, C, z, y_grad, saved)  # type: ignore[assignment]
    saved = None if saved is None else saved.contiguous()
    seq_idx = None if seq_idx is None else seq_idx.int()
    A, D, dt_bias, final_state_grad = (_fp32(t) for t in (A, D, dt_bias, final_state_grad))  # type: ignore[assignment]
    if into is None:
        dx, ddt = (torch.empty((batch, length, channels), dtype=x.dtype, device=x.device) for _ in range(2))
        dz = torch.empty_like(dx) if z is not None else None
    else:
        dx, ddt, dz = into
    dB, dC = (torch.empty((batch, length, states), dtype=x.dtype, device=x.device) for _ in range(2))
    initial_grad = x.new_empty((batch, channels, states), dtype=torch.float32)
    if dx.numel() == 0:
        zeros = (x.new_empty((0,)) if t is None else torch.zeros_like(t) for t in given)
        return *zeros, initial_grad  # type: ignore[return-value]
    dA = torch.empty_like(A)
    dD, dt_bias_grad = (None if t is None else torch.empty_like(t) for t in (D, dt_bias))

    index = x.device.index
    with torch.cuda.device(index):
        processors = device.processors(index)
        variant, apart = variants.backward_plan(states, batch, length, channels, processors)
        ends, decays = _ends(True, apart, y_grad, dt, z, C, A, dt_bias, dt_softplus, seq_idx)  # type: ignore[arg-type]
        time_parts = batch * apart  # of the sums over time
        A_parts = x.new_empty((time_parts, channels, states), dtype=torch.float32)
        D_parts, bias_parts = (x.new_empty((time_parts, channels), dtype=torch.float32) for _ in range(2))
        dtype, gated, packed = device.DTYPES[x.dtype], z is not None, seq_idx is not None
        aligned = device.aligned(channels, variant.vectors(dtype), (x, dt, z, y_grad, saved, dz))
        key = (index, variant, dtype, gated, packed, aligned)
        kernel = device.kernel("scan_backward", *key)

        groups = variant.groups(channels)
        part_bytes = batch * length * 2 * variant.padded_states * 4
        workers = min(groups, max(1, max(variants.FREE_PARTS_BYTES, 8 * x.numel()) // part_bytes))
        group_items = -(-groups // workers)
        workers = -(-groups // group_items)
        units = time_parts * workers
        at_once = min(kernel.at_once, -(-units // processors))
        in_turn = 1 if apart > 1 else variants.segments(units, length, states, processors, at_once)
        parts = x.new_empty((batch, workers, length, 2 * variant.padded_states), dtype=torch.float32)
        queue = torch.zeros(2 + units * (group_items * in_turn - 1), dtype=torch.int32, device=x.device)
        device.launch(
            kernel,
            min(units * in_turn, processors * at_once),
            variant.threads,
            kernel.shared_bytes,
            (
                *(argument for tensor in (x, dt, z, B, C) for argument in device.strided(tensor)),
                A,
                D,
                dt_bias,
                *device.strided(seq_idx),
                *device.strided(y_grad),
                final_state_grad,
                starts,
                saved,
                dx,
                ddt,
                *device.strided(dz),
                parts,
                A_parts,
                D_parts,
                bias_parts,
                initial_grad,
                ends,
                decays,
                queue,
                length,
                channels,
                states,
                workers,
                units,
                group_items,
                apart if apart > 1 else in_turn,
                dt_softplus,
            ),
        )
        sums = batch * length * 2 * variant.padded_states + channels * (states + 2)
        device.launch(
            device.kernel("sum_parts", *key),
            -(-sums // 256),
            256,
            0,
            (
                *(parts, A_parts, D_parts, bias_parts, dB, dC, dA, dD, dt_bias_grad),
                *(batch, length, channels, states, workers, time_parts),
            ),
        )
    grads = (dx, ddt, dA, dB, dC, dD, dz, dt_bias_grad)
    cast = (
        x.new_empty((0,)) if grad is None or t is None else _as(grad, t.dtype)
        for grad, t in zip(grads, given, strict=True)
    )
    return *cast, initial_grad  # type: ignore[return-value]
