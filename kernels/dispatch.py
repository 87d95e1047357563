"""Which implementation of an operator runs, and one line of the log where it is not the fast one."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from kernels.operator import Operator

_log = logging.getLogger(__name__)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)


def on_cuda(
    op: CustomOpDef | Operator, accelerated: Callable[..., Any], unsupported: Callable[..., str | None]
) -> None:
    """Have `accelerated` compute `op` on CUDA devices, except where `unsupported(*arguments)` gives a reason."""
    reference, name = op._init_fn, op._name

    @op.register_kernel("cuda")
    def _(*arguments):
        reason = unsupported(*arguments)
        if reason is None:
            return accelerated(*arguments)
        log_fallback(name, reason)
        return reference(*arguments)


@functools.cache
def log_fallback(operator: str, reason: str) -> None:
    """Once for each reason."""
    _log.warning("%s runs in plain PyTorch, slower: %s", operator, reason)


def triton_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can run on these activations, None when one can."""
    if x.dtype not in TRITON_DTYPES:
        return f"the Triton kernels do not compute in {x.dtype}"
    return _device_unsupported(x.device.index or 0)


@functools.cache
def _device_unsupported(index: int) -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU"
    if torch.cuda.get_device_capability(index) < _MIN_CAPABILITY:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(index)}, 8.0 is needed"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        _try(index)
    except Exception as error:  # Triton builds its launcher with a C compiler; a GPU may be too new for it
        return f"Triton can't compile or launch a kernel here ({' '.join(str(error).split())})"
    return None


def _try(index: int) -> None:
    """Compile and launch a kernel; raises whatever prevents that."""
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

    with torch.cuda.device(index):
        ones = torch.ones((2, 8), device=f"cuda:{index}")
        sum_parts[(1, 1)](ones, ones, None, 2, 8, KINDS=1, ROWS=ROWS, COLUMNS=COLUMNS)


@functools.cache
def processors(index: int | None) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index or 0).multi_processor_count


def early_start(x: Tensor) -> dict[str, Any]:
    """Launch options of a Triton kernel with a constant PDL: where it may start before the kernel before it has ended.

    Such a kernel (programmatic dependent launch) waits by itself, with `gdc_wait`, before it reads what others write.
    """
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and can_start_early(x.device.index) else {"PDL": False}


@functools.cache
def can_start_early(index: int | None) -> bool:
    """Whether a CUDA device has programmatic dependent launch."""
    return torch.cuda.get_device_capability(index or 0) >= (9, 0)


@functools.cache
def shared_bytes(index: int | None) -> int:
    """Shared memory that a program may have on a CUDA device, but for a few KiB of the compiler's own."""
    properties = torch.cuda.get_device_properties(index or 0)
    return properties.shared_memory_per_block_optin - 8192  # type: ignore[attr-defined]


@functools.cache
def has_large_shared_memory(index: int | None) -> bool:
    """Whether a program may have some 150 KiB of it, as on A100, H100 and B200; others have 99."""
    return shared_bytes(index) > 150 * 1024


def alignment(*sizes: int) -> int:
    """Elements that rows can be read in at a time: the largest power of two up to 8 that divides all sizes."""
    return math.gcd(8, *sizes)
