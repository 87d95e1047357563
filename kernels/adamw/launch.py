"""AdamW over many tensors in one launch: the table that tells the kernel where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import triton_unsupported

BLOCK, WARPS = 2048, 8


class Parameter(NamedTuple):
    """Memory of one parameter. All fp32 and contiguous but the copy, which is bf16 and may be missing."""

    weight: Tensor
    first: Tensor  # moment
    second: Tensor
    step: Tensor  # a scalar
    decay: float
    copy: Tensor | None


class FusedAdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) in place, for parameters of one CUDA device, and their copies in bf16.

    30 bytes of traffic for a weight with a copy. torch's own moves 28, 32 where it divides gradients, and the copies
    take another 6.
    """

    def __init__(self, parameters: Sequence[Parameter], beta1: float, beta2: float, eps: float) -> None:
        self._parameters = list(parameters)
        device = self._parameters[0].weight.device
        sizes = [p.weight.numel() for p in self._parameters]
        counts = torch.tensor([-(-size // BLOCK) for size in sizes])
        tensor = torch.arange(len(sizes)).repeat_interleave(counts)
        block = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
        self._blocks = torch.stack((tensor, block), dim=1).int().to(device)
        self._decays = torch.tensor([p.decay for p in self._parameters], device=device)
        logarithms = (math.log2(beta) if beta else -math.inf for beta in (beta1, beta2))
        constants = [beta1, beta2, *logarithms, eps]
        self._constants = torch.tensor(constants, dtype=torch.float64, device=device)
        self._addresses: list[int] = []  # of the gradients that the table names
        self._align = 1  # elements that are read at a time
        self._table = torch.zeros((0, 8), dtype=torch.int64, device=device)

    def __call__(self, gradients: Sequence[Tensor], lr: Tensor, divisor: Tensor) -> None:
        """One step with gradients / divisor; lr and divisor: fp32 scalars on the device."""
        from kernels.adamw.triton_kernels import adamw_kernel

        addresses = [gradient.data_ptr() for gradient in gradients]
        if addresses != self._addresses:
            self._write_table(addresses)
        torch._foreach_add_([p.step for p in self._parameters], 1.0)
        with torch.cuda.device_of(lr):
            adamw_kernel[(len(self._blocks),)](
                *(self._table, self._blocks, self._decays, self._constants, lr, divisor),
                *(self._align, BLOCK),
                num_warps=WARPS,
            )

    def _write_table(self, addresses: list[int]) -> None:
        """Raises RuntimeError while a CUDA graph is recorded: what stands in the table must outlast it."""
        is_cuda = self._table.is_cuda
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("gradients have moved since the update before the one that is to be recorded")
        rows = []
        for p, gradient in zip(self._parameters, addresses, strict=True):
            others = [0 if t is None else t.data_ptr() for t in (p.first, p.second, p.step, p.copy)]
            rows.append([p.weight.data_ptr(), gradient, *others, p.weight.numel(), 0])
        # 16 bytes at a time, where that is possible for all of them. The step is read alone.
        apart = ([*row[:4], row[5], 4 * row[6]] for row in rows)
        self._align = 1 if any(number % 16 for numbers in apart for number in numbers) else 4
        for row in rows:
            row[6] //= self._align
        table = torch.tensor(rows, pin_memory=is_cuda)
        self._table = table.to(self._table.device, non_blocking=True)
        self._addresses = addresses


def unsupported(weight: Tensor) -> str | None:
    """Why the kernel cannot run, None when it can."""
    if not weight.is_cuda or weight.dtype != torch.float32:
        return f"weights in {weight.dtype} on {weight.device.type}"
    return triton_unsupported(weight)
