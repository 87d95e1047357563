"""Launches of Triton kernels with less Python around each: small calls are bound by the host.

`kernel[grid](...)` looks at every argument and option to find the compiled kernel, and asks the driver about every
tensor. Here a kernel is found by what can change between two launches from one place, and started as PyTorch's own
compiler starts it.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
_compiled: dict[tuple[Any, ...], Any] = {}

remembered = functools.lru_cache(maxsize=512)
"""For functions of shapes, strides and dtypes that return a `Launch`: calls repeat."""


class Launch:
    """A kernel with its grid, numbers and constants: all that it is launched with but its tensors.

    Tensors are its first arguments, then come numbers, then constants. It must specialise on none of the numbers
    (`do_not_specialize`).
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], numbers: tuple[float, ...], constants: tuple[Any, ...], warps: int
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants, self.warps = kernel, grid, numbers, constants, warps
        wide = None if max(numbers) <= INT32_MAX else tuple(number > INT32_MAX for number in numbers)
        self._same = (kernel, warps, constants, wide)
        self._found: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current device, where the tensors are, and its current stream. The first tensor is there."""
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        device: int = tensors[0].device.index  # type: ignore[union-attr]
        key = (device, *[None if t is None else t.dtype for t in tensors])
        if functools.reduce(operator.or_, filter(None, addresses), 0) & 15:
            key += tuple([None if address is None else address & 15 for address in addresses])
        found = self._found.get(key)
        if found is None:
            return self._search(tensors, key)
        run, function, metadata = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, 1, stream, function, metadata, None, None, None, *addresses, *self.numbers, *self.constants)

    def _search(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...]) -> None:
        """Launch a kernel that no launch of this one has had; compile it if nobody has."""
        compiled = _compiled.get((*self._same, key))
        arguments = (*tensors, *self.numbers, *self.constants)
        if compiled is None:
            for parameter in getattr(self.kernel, "params", ())[len(tensors) : len(tensors) + len(self.numbers)]:
                assert parameter.do_not_specialize, f"{self.kernel.__name__} specialises on {parameter.name}"
            compiled = self.kernel[self.grid](*arguments, num_warps=self.warps)
            if compiled is None:  # it is interpreted
                return
            _compiled[(*self._same, key)] = compiled
        else:
            compiled[(*self.grid, 1)](*arguments)
        self._found[key] = (compiled.run, compiled.function, compiled.packed_metadata)
