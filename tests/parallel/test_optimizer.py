"""What engines give the update in one launch, and do after it, on a machine without a GPU; tests/gpu has the kernel."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.adamw import Parameter
from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import optimizer
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=16, d_state=4), tokenizer_vocab_size=31)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.3, eps=1e-3, max_grad_norm=0.5)


class OneLaunch:
    """As `FusedAdamW`: like the kernel it writes where no version counter sees it."""

    calls = 0

    def __init__(self, parameters: Sequence[Parameter], beta1: float, beta2: float, eps: float) -> None:
        self._parameters, self._betas, self._eps = parameters, (beta1, beta2), eps

    def __call__(self, gradients: Sequence[Tensor], lr: Tensor, divisor: Tensor) -> None:
        OneLaunch.calls += 1
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.step.add_(1)
            weight = p.weight.data.requires_grad_()
            weight.grad = gradient / divisor
            adamw = torch.optim.AdamW([weight], float(lr), self._betas, self._eps, p.decay, fused=True)
            adamw.state[weight] = {"step": p.step - 1, "exp_avg": p.first, "exp_avg_sq": p.second}
            adamw.step()
            if p.copy is not None:
                p.copy.data.copy_(p.weight)


@pytest.mark.parametrize("kind", [NativeEngine, ShardedEngine])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_the_update_in_one_launch_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, kind: type[NativeEngine], precision: Precision
) -> None:
    found = []
    for at_once in (False, True):
        if at_once:
            monkeypatch.setattr(optimizer, "unsupported", lambda weight: None)
            monkeypatch.setattr(optimizer, "FusedAdamW", OneLaunch)
        engine = kind(EngineConfig(device=DeviceKind.cpu, precision=precision), join())
        engine.prepare(MODEL, OPTIM, seed=0)
        generator, calls = torch.Generator().manual_seed(0), OneLaunch.calls
        results = []
        for lr in (1e-2, 1e-2, 5e-3):
            tokens = torch.randint(0, 31, (2, 2, 13), generator=generator)
            for batch in engine.micro_batches(list(tokens)):
                loss = engine.accumulate(batch[:, :-1], batch[:, 1:], None, torch.tensor(48.0)).item()
            results.append((loss, engine.step(lr).grad_norm))
        assert OneLaunch.calls - calls == (3 if at_once else 0)
        found.append((results, *whole_state(engine)))
    (expected, *parts), (results, *ours) = found
    assert results == expected
    for mine, theirs in zip(ours, parts, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", [NativeEngine, ShardedEngine])
def test_weights_and_moments_cannot_be_replaced(kind: type[NativeEngine]) -> None:
    """`FusedAdamW` would go on with those that were there."""
    engine = kind(EngineConfig(device=DeviceKind.cpu), join())
    engine.prepare(MODEL, OPTIM, seed=0)
    with pytest.raises(RuntimeError, match=r"would replace the moments; .* copy into them"):
        engine._optimizer.load_state_dict(engine._optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"assign=True\) would replace weights; .* copy into them"):
        engine.model.load_state_dict(engine.model.state_dict(), assign=True)
    engine.model.load_state_dict(engine.model.state_dict())  # copies


def test_a_step_with_weights_that_have_moved_is_refused() -> None:
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu), join())
    engine.prepare(MODEL, OPTIM, seed=0)
    tokens = torch.arange(26).reshape(2, 13)
    for _ in range(2):
        engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(24.0))
        engine.step(1e-2)
    before = [parameter.data for parameter in engine.model.parameters()]  # nothing else gets this memory
    engine.model.double().float()
    engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(24.0))
    with pytest.raises(RuntimeError, match="weights have moved since the first step"):
        engine.step(1e-2)
    assert len(before) > 10
