"""Launches of Triton kernels with less Python around each: small calls are bound by the host.

`kernel[grid](...)` looks at every argument and option to find the compiled kernel, and asks the driver about every
tensor. Here a kernel is found by what can change between two launches from one place, and started as PyTorch's own
compiler starts it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
SUM_WARPS = 4
_compiled: dict[tuple[Any, ...], Any] = {}

remembered = functools.lru_cache(maxsize=512)
"""For functions of shapes, strides and dtypes that return a `Launch`: calls repeat."""


_HERE = contextlib.nullcontext()


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where launches go: as `torch.cuda.device_of`, which asks the driver twice, also where nothing changes."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(device)


class Piece:
    """A part of a flat tensor, to launch kernels with: a view takes the host some five times as long."""

    __slots__ = ("_address", "_first", "dtype", "size", "whole")

    def __init__(self, whole: Tensor, address: int, first: int, size: int, dtype: torch.dtype) -> None:
        """address: of `whole`; first, size: in its elements; dtype: what they are read as."""
        self.whole, self._address, self._first, self.size, self.dtype = whole, address, first, size, dtype

    def data_ptr(self) -> int:
        return self._address

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def tensor(self) -> Tensor:
        """The view."""
        return self.whole.narrow(0, self._first, self.size).view(self.dtype)


Pointer = Tensor | Piece


def pieces(whole: Tensor, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[Piece]:
    """A flat tensor in parts of so many elements, each with the dtype it is read as."""
    address, n_bytes, firsts = whole.data_ptr(), whole.element_size(), (0, *itertools.accumulate(sizes))
    parts = zip(firsts, sizes, dtypes, strict=False)
    return [Piece(whole, address + first * n_bytes, first, size, dtype) for first, size, dtype in parts]


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
        self._place, self._rest = (*grid, 1), (*numbers, *constants)

    def __call__(self, *tensors: Pointer | None) -> None:
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
        run(*self._place, stream, function, metadata, None, None, None, *addresses, *self._rest)

    def _search(self, pointers: tuple[Pointer | None, ...], key: tuple[Any, ...]) -> None:
        """Launch a kernel that no launch of this one has had; compile it if nobody has."""
        tensors = [pointer.tensor() if isinstance(pointer, Piece) else pointer for pointer in pointers]
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
