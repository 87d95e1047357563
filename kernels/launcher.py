"""Launches of Triton kernels with less Python around each: small calls are bound by the host.

`kernel[grid](...)` looks at every argument and option to find the compiled kernel. Here a kernel is found by what can
change between two launches from one place, and launched as Triton's tutorial on fused softmax does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

INT32_MAX = 2**31 - 1
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Launch `kernel` on the current device and stream; its arguments are tensors, numbers, constants in this order.

    The first tensor is there. The kernel must specialise on none of its numbers (`do_not_specialize`).
    """
    key = (
        kernel,
        warps,
        constants,
        tensors[0].device.index,  # type: ignore[union-attr]
        None if max(numbers) <= INT32_MAX else tuple(number > INT32_MAX for number in numbers),
        *[None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1)](*tensors, *numbers, *constants)
        return
    for parameter in getattr(kernel, "params", ())[len(tensors) : len(tensors) + len(numbers)]:
        assert parameter.do_not_specialize, f"{kernel.__name__} specialises on {parameter.name}"
    _compiled[key] = kernel[grid](*tensors, *numbers, *constants, num_warps=warps)  # None where it is interpreted
