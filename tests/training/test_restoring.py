"""What a checkpoint puts back into an engine: all of it, and all that was made of what was there before."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mamba_train.checkpoint import Checkpoint, rng, save
from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import OtherRankFailed, join
from mamba_train.training.restoring import restore_tensors

TOKENS = torch.arange(26).reshape(2, 13)


def make_engine(n_layer: int = 2) -> ShardedEngine:
    """FSDP2, whose root stays gathered after a pass."""
    model = ModelConfig(name="test", n_layer=n_layer, d_model=16, d_state=4)
    engine = ShardedEngine(EngineConfig(device=DeviceKind.cpu), join())
    engine.prepare(resolve_model_config(model, tokenizer_vocab_size=31), OptimConfig(lr=1e-2), seed=0)
    return engine


def train(engine: ShardedEngine) -> None:
    engine.accumulate(TOKENS[:, :-1], TOKENS[:, 1:], None, torch.tensor(24.0))
    engine.step(1e-2)


@torch.no_grad()
def evaluate(engine: ShardedEngine) -> float:
    return engine.model(TOKENS[:, :-1], TOKENS[:, 1:]).item()


def saved(engine: ShardedEngine, folder: Path) -> Path:
    return save(folder, Checkpoint(1, *whole_state(engine), rng.capture()), reserve_gib=0)


def test_weights_moments_and_random_states_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    engine = make_engine()
    train(engine)
    checkpoint, state, loss = saved(engine, tmp_path), whole_state(engine), evaluate(engine)
    drawn = torch.rand(3)
    train(engine)
    assert evaluate(engine) != loss
    restore_tensors(checkpoint, engine, pytest.fail)
    assert torch.equal(torch.rand(3), drawn)
    for ours, theirs in zip(whole_state(engine), state, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert evaluate(engine) == loss


def test_a_rank_that_has_no_random_states_there_keeps_its_own(tmp_path: Path) -> None:
    """A run goes on with more ranks than have saved: not all with the states of one."""
    engine = make_engine()
    checkpoint = saved(engine, tmp_path)
    engine.rank = 1
    torch.manual_seed(9)
    restore_tensors(checkpoint, engine, pytest.fail)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))


def test_what_one_rank_cannot_load_stops_all(tmp_path: Path) -> None:
    engine = make_engine()
    checkpoint, other = saved(engine, tmp_path), make_engine(n_layer=1)
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        restore_tensors(checkpoint, other, pytest.fail)
    loaded = []

    def together(load: object) -> None:
        loaded.append(load)
        raise OtherRankFailed("DamagedCheckpoint")

    engine.ranks = SimpleNamespace(together=together)  # type: ignore[assignment]
    with pytest.raises(OtherRankFailed):
        restore_tensors(checkpoint, engine, pytest.fail)
    assert len(loaded) == 1
