"""Gradients computed on a stream of their own are those that are computed in between, bit by bit."""

import pytest
import torch

from mamba_train.config import EngineConfig, ModelConfig, OptimConfig, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import join

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = {
    "mamba": ModelConfig(name="test", n_layer=6, d_model=256, d_state=16),
    "mamba2": ModelConfig(name="test", mixer="mamba2", n_layer=6, d_model=256, d_state=64, head_dim=64),
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.scan, Recompute.layer])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_bits(monkeypatch: pytest.MonkeyPatch, name: str, recompute: Recompute, recorded: bool) -> None:
    config = resolve_model_config(MODELS[name], tokenizer_vocab_size=997)
    found = []
    for beside in (True, False):
        monkeypatch.setattr(NativeEngine, "works_beside", beside)
        engine = NativeEngine(EngineConfig(cuda_graphs=recorded, recompute=recompute), join())
        engine.prepare(config, OptimConfig(lr=1e-3), seed=0)
        assert engine._casts is not None
        assert (engine._casts.beside is not None) == beside
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            losses = []
            for _ in range(2):
                tokens = torch.randint(0, 997, (4, 513), generator=generator).cuda()
                loss = engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(4096.0, device="cuda"))
                losses.append(loss.item())
            found.append((losses, engine.step(1e-3).grad_norm))
    assert found[:4] == found[4:]
