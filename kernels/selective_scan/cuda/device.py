"""What the CUDA scan asks of a device: whether kernels can run there, to load them, to launch them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.selective_scan.cuda import variants
from kernels.selective_scan.cuda.compile import compile_kernel, compiler_version
from kernels.selective_scan.cuda.variants import Variant

_log = logging.getLogger(__name__)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MIN_CAPABILITY = (8, 0)


class Kernel(NamedTuple):
    """A kernel of one device, ready to be launched."""

    function: Any  # driver.CUfunction
    shared_bytes: int
    at_once: int  # blocks that fit on a multiprocessor
    code: Any  # keeps it loaded


def unsupported(x: Tensor, states: int) -> str | None:
    """Why these inputs cannot run here, None when they can. Reads only the device, dtypes and sizes."""
    if x.dtype not in DTYPES:
        reason: str | None = f"the CUDA kernels do not compute in {x.dtype}"
    elif states > variants.MAX_STATES:
        reason = f"{states} states are more than {variants.MAX_STATES}"
    else:
        reason = device_unsupported(x.device.index or 0)
    if reason is not None:
        _warn(reason)
    return reason


@functools.cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    _log.warning("selective_scan runs in plain PyTorch, much slower: %s", reason)


@functools.cache
def device_unsupported(index: int) -> str | None:
    """Why no kernel can run on this device, None when one can."""
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
            cuda = (torch.version.cuda or "").split(".")[0]
            return f'NVRTC can\'t be loaded ({error}); pip install "cuda-core[cu{cuda}]"'
        try:
            _try(index)
        except Exception as error:  # an NVRTC that does not know the GPU, a driver that does not take its code
            reason = f"a kernel can't be compiled or loaded for this GPU ({error})"
    return reason


def _try(index: int) -> None:
    """Compile and load a kernel; raises whatever prevents that."""
    smallest = variants.forward_variant(16, 1, 1, 1000)
    kernel("scan_forward", index, smallest, DTYPES[torch.float32], False, False, False)


@functools.cache
def kernel(name: str, index: int, variant: Variant, dtype: int, gated: bool, packed: bool, aligned: bool) -> Kernel:
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    major, minor = torch.cuda.get_device_capability(index)
    macros = variant.macros(dtype, gated, packed, aligned)
    code = ObjectCode.from_cubin(compile_kernel(variant.source, f"sm_{major}{minor}", macros))
    handle, shared_bytes = int(code.get_kernel(name).handle), macros["SHARED_BYTES"]
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    function = driver.CUfunction(handle)
    (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(handle), driver.CUdevice(index))
    if error == driver.CUresult.CUDA_SUCCESS:
        count = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        error, at_once = count(function, variant.threads, shared_bytes)
    if error != driver.CUresult.CUDA_SUCCESS or at_once == 0:
        raise RuntimeError(f"{name} asks for {shared_bytes} bytes of shared memory, which this GPU refuses: {error}")
    return Kernel(function, shared_bytes, at_once, code)


@functools.cache
def processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    kernel: Kernel, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]
) -> None:
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
    (error,) = driver.cuLaunchKernel(
        kernel.function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the selective scan did not start: {error}")


def strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    if tensor is None:
        return None, 0, 0
    strides = tensor.stride()
    return tensor, strides[0], strides[1]


def aligned(channels: int, vectors: tuple[int, int], tensors: Sequence[Tensor | None]) -> bool:
    """Whether rows can be copied in vectors: see `Variant.vectors`."""
    size, step = vectors
    if channels % step:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        batch, strides = tensor.shape[0], tensor.stride()
        if tensor.data_ptr() % size or strides[1] % step or (batch > 1 and strides[0] % step):
            return False
    return True
