"""The small model that the checks inside ranks train, and an engine with it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mamba_train.config import Config, ModelConfig, OptimConfig
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import sharded
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine
from mamba_train.ranks import Ranks

# An odd width: what two ranks cut is filled up, and rows of a matrix are cut in the middle.
MODEL = resolve_model_config(
    ModelConfig(name="test", n_layer=2, d_model=33, d_state=4, d_intermediate=24), tokenizer_vocab_size=31
)
OPTIM = OptimConfig(lr=1e-2, beta1=0.9, max_grad_norm=1e9)
sharded.LEAST_UNITS = 1  # FSDP2 gathers both layers together, as it does a few of many


def make(config: Config, group: Ranks) -> Engine:
    engine = build_engine(config.engine, group)
    engine.prepare(MODEL, OPTIM, seed=0)
    return engine


def backward(engine: Engine, scale: float = 1.0, seed: int = 0, n_micro_batches: int = 1) -> None:
    """The same tokens on all ranks, with a loss that each may scale."""
    for number in engine.micro_batches(range(n_micro_batches)):
        tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(seed + number))
        with engine.compute():
            loss = engine.model(tokens[:, :-1], tokens[:, 1:], None) / 22
        engine.backward(loss * scale)


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
