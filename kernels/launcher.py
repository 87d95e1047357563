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
SUM_WARPS = 4
_compiled: dict[tuple[Any, ...], Any] = {}

remembered = functools.lru_cache(maxsize=512)
"""For functions of shapes, strides and dtypes that return a `Launch`: calls repeat."""


class Launch:
    """A kernel with its grid, numbers and constants: all that it is launched with but its tensors.

    Tensors are its first arguments, then come numbers, then constants. Numbers that it specialises on (those not in
    `do_not_specialize`) are part of what it is compiled for. early: it is launched before the kernel before it has
    ended, for which it waits by itself (see `early_start`).
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        early: bool = False,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
        wide = None if max(numbers) <= INT32_MAX else tuple(number > INT32_MAX for number in numbers)
        self._same = (kernel, warps, early, constants, wide)
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
        parameters = getattr(self.kernel, "params", ())[len(tensors) :]
        special = [n for n, parameter in zip(self.numbers, parameters, strict=False) if not parameter.do_not_specialize]
        same = (*self._same, *special, key)
        compiled = _compiled.get(same)
        arguments = (*tensors, *self.numbers, *self.constants)
        if compiled is None:
            compiled = self.kernel[self.grid](*arguments, **self.options)
            if compiled is None:  # it is interpreted
                return
            _compiled[same] = compiled
        else:
            compiled[(*self.grid, 1)](*arguments)
        self._found[key] = (compiled.run, compiled.function, compiled.packed_metadata)


@remembered
def sum_launch(rows: int, columns: int, kinds: int) -> Launch:
    """Of `sum_parts`, the second half of a sum of that many parts."""
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

    return Launch(sum_parts, (-(-columns // COLUMNS), kinds), (rows, columns), (kinds, ROWS, COLUMNS), SUM_WARPS)
