"""The operators `mamba_train::selective_scan` and its backward on CUDA devices: checks, buffers, launches."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.selective_scan.cuda import variants
from kernels.selective_scan.cuda.compile import compile_kernel, compiler_version
from kernels.selective_scan.cuda.variants import Variant

_log = logging.getLogger(__name__)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MIN_CAPABILITY = (8, 0)


def unsupported(x: Tensor, states: int) -> str | None:
    """Why these inputs cannot run here, None when they can. Reads only the device, dtypes and sizes."""
    if x.dtype == torch.float64:
        return "fp64 runs in the reference"
    if states > variants.MAX_STATES:
        return f"{states} states are more than {variants.MAX_STATES}"
    return device_unsupported(x.device.index or 0)


@functools.cache
def device_unsupported(index: int) -> str | None:
    """Why no kernel can be compiled for this device, None when it can; says so in the log, once."""
    reason = None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        reason = "no NVIDIA GPU"
    elif torch.cuda.get_device_capability(index) < _MIN_CAPABILITY:
        reason = f"the GPU has compute capability {torch.cuda.get_device_capability(index)}, 8.0 is needed"
    elif importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        reason = "cuda-core is not installed (pip install cuda-core)"
    else:
        try:
            compiler_version()
        except Exception as error:  # of the loader: which one depends on what is missing
            reason = f"NVRTC can't be loaded ({error})"
    if reason is not None:
        _log.warning("selective_scan runs in plain PyTorch, much slower: %s", reason)
    return reason


def starts_shape(x: Tensor, states: int) -> tuple[int, int, int, int]:
    """Shape of the fp32 states that the forward saves: (batch, tiles, channel, padded states)."""
    tiles = -(-x.shape[1] // variants.tile_steps(states))
    return x.shape[0], tiles, x.shape[2], variants.padded(states)


@functools.cache
def _kernel(source: str, name: str, index: int, variant: Variant, dtype: int, gated: bool, packed: bool, aligned: bool):
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    major, minor = torch.cuda.get_device_capability(index)
    macros = variant.macros(dtype, gated, packed, aligned)
    kernel = ObjectCode.from_cubin(compile_kernel(source, f"sm_{major}{minor}", macros)).get_kernel(name)
    (error,) = driver.cuKernelSetAttribute(
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        macros["SHARED_BYTES"],
        driver.CUkernel(int(kernel.handle)),
        driver.CUdevice(index),
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} asks for {macros['SHARED_BYTES']} bytes of shared memory: {error}")
    return kernel


@functools.cache
def _blocks_at_once(kernel, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel fit on a multiprocessor."""
    from cuda.bindings import driver

    function = driver.CUfunction(int(kernel.handle))
    error, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared_bytes)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the selective scan does not fit on this GPU: {error}")
    return blocks


def _launch(kernel, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]) -> None:
    """Launch on the current stream; all parameters of the kernels are 8 bytes wide."""
    from cuda.bindings import driver
    from cuda.core import Device

    # Autograd runs the backward in a thread of its own, where no context need be current yet.
    error, context = driver.cuCtxGetCurrent()
    if error != driver.CUresult.CUDA_SUCCESS or int(context) == 0:
        Device(torch.cuda.current_device()).set_current()
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else int(a) for a in arguments]
    packed = (ctypes.c_int64 * len(values))(*values)
    first = ctypes.addressof(packed)
    pointers = (ctypes.c_void_p * len(values))(*range(first, first + 8 * len(values), 8))
    stream = torch.cuda.current_stream().cuda_stream
    grid, block = (blocks, 1, 1), (threads, 1, 1)
    function = driver.CUfunction(int(kernel.handle))
    (error,) = driver.cuLaunchKernel(function, *grid, *block, shared_bytes, stream, ctypes.addressof(pointers), 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the selective scan did not start: {error}")


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def _aligned(channels: int, variant: Variant, tensors: Sequence[Tensor | None]) -> bool:
    """Whether rows can be copied in vectors: see COPY_BYTES in common.cuh."""
    for tensor in tensors:
        if tensor is None:
            continue
        row = variant.warp_channels * tensor.element_size()
        size = next(size for size in (16, 8, 4) if row % size == 0)
        step = max(size // tensor.element_size(), min(4, variant.warp_channels))
        if channels % step or tensor.data_ptr() % size:
            return False
        if any(tensor.stride(axis) % step for axis in (0, 1) if tensor.shape[axis] > 1):
            return False
    return True


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _activations(*tensors: Tensor | None) -> list[Tensor | None]:
    """Give all activations one dtype and a channel stride of 1: copies only where they have not."""
    dtypes = {t.dtype for t in tensors if t is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [None if t is None else _rows(t.to(dtype)) for t in tensors]


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
        return y.to(y_dtype), final_state, starts, ungated.to(y_dtype)

    with torch.cuda.device(x.device):
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        variant = variants.forward_variant(states, batch, channels, processors)
        dtype, gated, packed = _DTYPES[x.dtype], z is not None, seq_idx is not None
        aligned = _aligned(channels, variant, (x, dt, z))
        kernel = _kernel("forward", "scan_forward", x.device.index, variant, dtype, gated, packed, aligned)
        groups = variant.groups(channels)
        _launch(
            kernel,
            batch * groups,
            variant.threads,
            variant.shared_bytes(dtype, gated),
            (
                *(argument for tensor in (x, dt, z, B, C) for argument in _strided(tensor)),
                A,
                D,
                dt_bias,
                *_strided(seq_idx),
                initial_state,
                y,
                ungated if ungated.numel() else None,
                final_state,
                starts if for_backward else None,
                length,
                channels,
                states,
                groups,
                dt_softplus,
            ),
        )
    return y.to(y_dtype), final_state, starts, ungated.to(y_dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one."""
    given = (x, dt, A, B, C, D, z, dt_bias)
    (batch, length, channels), states = x.shape, A.shape[1]
    y_grad = torch.zeros_like(x) if y_grad is None else y_grad
    saved = ungated if z is not None else None
    x, dt, B, C, z, y_grad, saved = _activations(x, dt, B, C, z, y_grad, saved)  # type: ignore[assignment]
    saved = None if saved is None else saved.contiguous()
    seq_idx = None if seq_idx is None else seq_idx.int()
    A, D, dt_bias, final_state_grad = (_fp32(t) for t in (A, D, dt_bias, final_state_grad))  # type: ignore[assignment]
    dx, ddt = (torch.empty((batch, length, channels), dtype=x.dtype, device=x.device) for _ in range(2))
    dz = torch.empty_like(dx) if z is not None else None
    dB, dC = (torch.empty((batch, length, states), dtype=x.dtype, device=x.device) for _ in range(2))
    initial_grad = x.new_empty((batch, channels, states), dtype=torch.float32)
    A_parts = torch.empty_like(initial_grad)
    D_parts, bias_parts = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(2))

    if dx.numel() == 0:
        zeros = (x.new_empty((0,)) if t is None else torch.zeros_like(t) for t in given)
        return *zeros, initial_grad  # type: ignore[return-value]
    with torch.cuda.device(x.device):
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        variant = variants.backward_variant(states, batch, channels, processors)
        dtype, gated, packed = _DTYPES[x.dtype], z is not None, seq_idx is not None
        aligned = _aligned(channels, variant, (x, dt, z, y_grad, saved))
        key = (x.device.index, variant, dtype, gated, packed, aligned)
        groups = variant.groups(channels)
        part_bytes = batch * length * 2 * variant.padded_states * 4
        workers = min(groups, max(1, max(variants.FREE_PARTS_BYTES, 8 * x.numel()) // part_bytes))
        group_items = -(-groups // workers)
        workers = -(-groups // group_items)
        kernel, shared_bytes = _kernel("backward", "scan_backward", *key), variant.shared_bytes(dtype, gated)
        units, at_once = batch * workers, _blocks_at_once(kernel, variant.threads, shared_bytes)
        at_once = min(at_once, -(-units // processors))
        segments = variants.segments(units, length, states, processors, at_once)
        parts = x.new_empty((batch, workers, length, 2 * variant.padded_states), dtype=torch.float32)
        queue = torch.zeros(2 + units * (group_items * segments - 1), dtype=torch.int32, device=x.device)
        _launch(
            kernel,
            min(units * segments, processors * at_once),
            variant.threads,
            shared_bytes,
            (
                *(argument for tensor in (x, dt, z, B, C) for argument in _strided(tensor)),
                A,
                D,
                dt_bias,
                *_strided(seq_idx),
                *_strided(y_grad),
                final_state_grad,
                starts,
                saved,
                dx,
                ddt,
                dz,
                parts,
                A_parts,
                D_parts,
                bias_parts,
                initial_grad,
                queue,
                length,
                channels,
                states,
                workers,
                units,
                group_items,
                segments,
                dt_softplus,
            ),
        )
        sums = batch * length * 2 * variant.padded_states
        _launch(
            _kernel("backward", "sum_BC_parts", *key),
            -(-sums // 256),
            256,
            0,
            (parts, dB, dC, length, states, workers, batch * length),
        )
    grads = (
        dx,
        ddt,
        A_parts.sum(dim=0),
        dB,
        dC,
        x.new_empty((0,)) if D is None else D_parts.sum(dim=0),
        x.new_empty((0,)) if dz is None else dz,
        x.new_empty((0,)) if dt_bias is None else bias_parts.sum(dim=0),
    )
    cast = (grad.to((x if t is None else t).dtype) for grad, t in zip(grads, given, strict=True))
    return *cast, initial_grad  # type: ignore[return-value]
