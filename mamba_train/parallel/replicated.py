"""DDP: every rank has the whole model and works on its part of the batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mamba_train.config import EngineConfig, Precision
from mamba_train.model.language_model import MambaLM
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import Ranks, lone_group


class ReplicatedEngine(NativeEngine):
    """`DistributedDataParallel`; gradients are summed in fp32, or in bf16 if engine.reduce_precision says so."""

    may_record = False

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        lone_group()

    def _wrapped(self, model: MambaLM) -> nn.Module:
        self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        hook = _sum_in_bf16 if self.config.reduce_precision is Precision.bf16 else _sum
        self._ddp.register_comm_hook(dist.group.WORLD, hook)
        return self._ddp

    def _before_micro_batch(self, *, is_last: bool) -> None:
        # What its `no_sync` sets, which would have to enclose the forward pass in the loop.
        self._ddp.require_backward_grad_sync = is_last


def _sum(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum over the ranks, where DDP by itself takes the mean."""
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _sum_in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    future = dist.all_reduce(buffer.bfloat16(), group=group, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))
