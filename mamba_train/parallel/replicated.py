"""Data parallelism: every rank has the whole model and works on its part of the batch."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mamba_train.config import EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.parallel.buckets import GradientBuckets
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import Ranks, lone_group


class ReplicatedEngine(NativeEngine):
    """`NativeEngine` on each rank; gradients are summed in fp32, or in bf16 if engine.reduce_precision says so."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        lone_group()

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        super().prepare(model_config, optim, seed)
        reduce_dtype = torch.bfloat16 if self.config.reduce_precision is Precision.bf16 else torch.float32
        self._buckets = GradientBuckets(list(self._parameters.values()), reduce_dtype)
        if self._casts is not None:
            self._casts.on_gradient = self._buckets.complete

    def _before_micro_batch(self, *, is_last: bool) -> None:
        self._is_last = is_last

    def backward(self, loss: Tensor) -> None:
        self._buckets.begin(is_last=self._is_last)
        super().backward(loss)
        self._buckets.finish()

    def _begin_gradients(self) -> None:
        self._buckets.clear()

    def _added_at_once(self) -> AbstractContextManager[object]:
        return nullcontext()  # each is waited for as it comes

    def _forget_gradients(self) -> None:
        pass  # they are always there
