"""Gradients of replicated weights: a few flat tensors, each summed over the ranks while the backward pass goes on.

What DDP does, but with collectives that a CUDA graph can hold, and in an order that never changes: where an element
lies decides in which order the values of three or more ranks are added, so a start goes on with the bits of the run
that was stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20  # of fp32 gradients: large enough for the full rate, small enough to begin early


@dataclass
class _Bucket:
    gradients: Tensor  # flat, fp32
    n_parameters: int
    complete: set[Tensor] = field(default_factory=set)  # parameters
    sums: list[tuple[dist.Work, Tensor]] = field(default_factory=list)  # under way, and where the sum arrives


class GradientBuckets:
    """Owns `.grad` of `parameters`, of which it makes parts of buckets, filled from the last parameter to the first.

    reduce_dtype: what travels. Whoever runs a backward pass says before it whether it is the step's last (`begin`).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduce_dtype: torch.dtype) -> None:
        self._reduce_dtype = reduce_dtype
        self._is_last = False
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._buckets = [self._make(group) for group in _groups(list(parameters)[::-1])]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.complete)

    def _make(self, parameters: list[nn.Parameter]) -> _Bucket:
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        bucket = _Bucket(flat, len(parameters))
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
            self._bucket_of[parameter] = bucket
        return bucket

    def begin(self, *, is_last: bool) -> None:
        """A backward pass follows; is_last: after which the gradients are to be summed over the ranks."""
        self._is_last = is_last
        for bucket in self._buckets:  # of a pass that failed
            bucket.complete.clear()
            bucket.sums.clear()

    def complete(self, parameter: Tensor) -> None:
        """This pass has added to the gradient of `parameter` all that it will."""
        if not self._is_last:
            return
        bucket = self._bucket_of[parameter]  # type: ignore[index]
        if parameter in bucket.complete:  # torch calls this, too, for what a function has added by itself
            return
        bucket.complete.add(parameter)
        if len(bucket.complete) == bucket.n_parameters:
            travelling = bucket.gradients.to(self._reduce_dtype)
            bucket.sums.append((dist.all_reduce(travelling, async_op=True), travelling))

    def finish(self) -> None:
        """Have what follows on this device wait for the sums; after a backward pass."""
        if not self._is_last:
            return
        for bucket in self._buckets:
            assert bucket.sums, "a parameter got no gradient"
            for work, total in bucket.sums:
                work.wait()
                if total is not bucket.gradients:
                    bucket.gradients.copy_(total)
            bucket.sums.clear()
            bucket.complete.clear()

    def clear(self) -> None:
        for bucket in self._buckets:
            bucket.gradients.zero_()


def _groups(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours of at most BUCKET_BYTES together, or single ones that are larger."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = 4 * parameter.numel()
        if not groups or size > room:
            groups.append([])
            room = BUCKET_BYTES
        groups[-1].append(parameter)
        room -= size
    return groups
