"""Work for which the rest of a pass does not wait, on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

TOGETHER = 3  # pieces of work that are waited for at once: about those of a layer


class Beside:
    """Weight gradients beside the backward pass, which needs none of them: they fill what its kernels leave empty.

    A kernel leaves a part of the GPU idle while its last programs end and the next one starts, and a small one all the
    time. What a piece of work reads must neither be overwritten nor given back while it may not have been done, so it
    is held until the pass has waited for it, a few pieces later.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._held: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def __call__(self, work: Callable[[], None], *tensors: Tensor) -> None:
        """Do `work` after all that has been launched; tensors: all that it reads and writes, made on this stream."""
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            work()
        self._held.append((self._stream.record_event(), tensors))
        if len(self._held) == 2 * TOGETHER:
            done = [self._held.popleft() for _ in range(TOGETHER)]
            stream.wait_event(done[-1][0])

    def join(self) -> None:
        """Have what follows on this stream wait for all of it."""
        torch.cuda.current_stream().wait_stream(self._stream)
        self._held.clear()
