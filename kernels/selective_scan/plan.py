"""How the reference scan cuts its work: which parts of the sequence run side by side, and in which chunks.

An elementwise PyTorch operation runs on several CPU threads only when each gets `GRAIN` elements, and one time step of
a small model has fewer. So the sequence is cut into `blocks` of equal length that advance together, one step of all
of them being one operation; a first pass finds the state in which each block starts. Rows (a block of a sequence of
the batch) are gathered in `groups`, the outermost axis of every tensor, one for each thread: PyTorch hands each thread
a contiguous share, so a thread meets the same rows in every operation and finds them in its own cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN = 32768  # at::internal::GRAIN_SIZE
CHUNK_ELEMENTS = 262144  # of one group: a few fp32 buffers of 1 MiB stay near the core that works on them
MIN_CHUNK = 8  # steps; shorter chunks save more start states than they save time
MIN_BLOCK = 16  # steps
GPU_STEP_ELEMENTS = 2**22  # one step of all blocks, so that kernels outlast their launch
GPU_CHUNK = 16  # steps


@dataclass(frozen=True)
class Plan:
    """The cut of (batch, length) into blocks x chunks x steps, the tail padded with steps that change nothing."""

    batch: int
    length: int
    blocks: int  # of each sequence, running side by side
    chunks: int  # of each block, one after the other
    groups: int  # of rows

    @property
    def rows(self) -> int:
        """Rows of one group."""
        return self.batch * self.blocks // self.groups

    @property
    def steps(self) -> int:
        """Time steps of one chunk."""
        return math.ceil(math.ceil(self.length / self.blocks) / self.chunks)

    def split(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch, length, n) of any strides to a new (chunks, groups, steps, rows, n)."""
        padding = self.blocks * self.chunks * self.steps - self.length
        if padding:
            values = F.pad(values, (0, 0, 0, padding))
        values = values.reshape(self.groups, self.rows, self.chunks, self.steps, values.shape[2])
        return values.permute(2, 0, 3, 1, 4).to(dtype, memory_format=torch.contiguous_format, copy=True)

    def join(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(chunks, groups, steps, rows, n) to a new (batch, length, n)."""
        whole = values.permute(1, 3, 0, 2, 4).reshape(self.batch, -1, values.shape[4])
        return whole[:, : self.length].to(dtype, memory_format=torch.contiguous_format, copy=True)

    def split_state(self, states: Tensor) -> Tensor:
        """View (batch, blocks, state, channel) as (groups, rows, state, channel)."""
        return states.reshape(self.groups, self.rows, *states.shape[2:])

    def join_state(self, states: Tensor) -> Tensor:
        """View (groups, rows, state, channel) as (batch, blocks, state, channel)."""
        return states.reshape(self.batch, self.blocks, *states.shape[2:])


def make_plan(batch: int, length: int, step_elements: int, device: torch.device) -> Plan:
    """Choose the cut for a scan whose state has `step_elements` = channels x states numbers in each sequence."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        wanted = math.ceil(threads * GRAIN / (batch * step_elements))
        even = threads // math.gcd(batch, threads)  # makes the rows divide among the threads
        blocks = math.ceil(wanted / even) * even
    else:
        threads = 1
        blocks = math.ceil(GPU_STEP_ELEMENTS / (batch * step_elements))
    blocks = max(1, min(blocks, length // MIN_BLOCK))
    groups = math.gcd(batch * blocks, threads)
    steps = GPU_CHUNK
    if device.type == "cpu":
        steps = max(MIN_CHUNK, CHUNK_ELEMENTS * groups // (batch * blocks * step_elements))
    return Plan(batch, length, blocks, math.ceil(math.ceil(length / blocks) / steps), groups)
