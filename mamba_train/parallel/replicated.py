"""DDP: every rank has the whole model and works on its part of the batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mamba_train.config import EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import MambaLM
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import Ranks, lone_group


class ReplicatedEngine(NativeEngine):
    """`DistributedDataParallel`; gradients are summed in fp32, or in bf16 if engine.reduce_precision says so."""

    may_record = False

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        lone_group()

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        super().prepare(model_config, optim, seed)
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Let DDP arrange its buckets before the first step.

        It does so anew after the first backward pass of a process, in the order in which gradients came. Where an
        element lies decides in which order the ranks' values are added: with three ranks or more a start would round
        its first step otherwise than the run that was never stopped.
        """
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with torch.compiler.set_stance("force_eager"):
            for _ in self.micro_batches([tokens]):
                with self.compute():
                    loss = self.model(tokens, tokens, None)
                self.backward(0.0 * loss)
        for parameter in self._parameters.values():
            parameter.grad = None

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
