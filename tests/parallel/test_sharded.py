"""FSDP2 as far as one process without a GPU can show it; tests/distributed has several, tests/gpu real graphs."""

import torch

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=16, d_state=4), tokenizer_vocab_size=31)


def train(engine: NativeEngine) -> list[tuple[float, float]]:
    engine.prepare(MODEL, OptimConfig(lr=1e-2, max_grad_norm=1.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        tokens = torch.randint(0, 31, (2, 13), generator=generator)
        for batch in engine.micro_batches([tokens]):
            loss = engine.accumulate(batch[:, :-1], batch[:, 1:], None, torch.tensor(24.0)).item()
        found.append((loss, engine.step(1e-2).grad_norm))
    return found


def test_the_update_of_parts_is_that_of_one_device() -> None:
    config = EngineConfig(device=DeviceKind.cpu)
    sharded, plain = ShardedEngine(config, join()), NativeEngine(config, join())
    assert train(sharded) == train(plain)
    for ours, theirs in zip(whole_state(sharded), whole_state(plain), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(parameter.grad is None for parameter in sharded.model.parameters())
    assert sharded._on_parts is not None
    assert all(part.grad is None for group in sharded._on_parts.param_groups for part in group["params"])
