from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import resolve_model_config
from mamba_train.model.mixers import Mamba1Mixer
from mamba_train.parallel.cast_once import CastOnce
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=16, d_state=4), tokenizer_vocab_size=31)


def products(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x)


def test_the_same_products_as_autocast_and_a_gradient_that_is_rounded_less() -> None:
    torch.manual_seed(0)
    plain, once = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    once.load_state_dict(plain.state_dict())
    casts = CastOnce([once], torch.bfloat16)
    exact = torch.zeros_like(plain.weight)
    for _ in range(3):
        x, y_grad = torch.randn(2, 5, 24).bfloat16(), torch.randn(2, 5, 40).bfloat16()
        x_plain, x_once = x.clone().requires_grad_(), x.clone().requires_grad_()
        casts.refresh()
        y, expected = products(x_once, once), products(x_plain, plain)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, expected)
        y.backward(y_grad)
        expected.backward(y_grad)
        assert torch.equal(x_once.grad, x_plain.grad)
        exact += y_grad.flatten(0, 1).float().t() @ x.flatten(0, 1).float()
    assert once.weight.grad is not None
    assert once.weight.grad.dtype is torch.float32
    torch.testing.assert_close(once.weight.grad, exact, rtol=1e-5, atol=1e-5)
    assert (plain.weight.grad - exact).norm() > 10 * (once.weight.grad - exact).norm()


def test_without_autocast_the_weight_itself_is_used() -> None:
    linear = nn.Linear(24, 40, bias=False)
    x = torch.randn(3, 24)
    expected = linear(x)
    CastOnce([linear], torch.bfloat16)
    assert torch.equal(linear(x), expected)


def test_a_copy_is_made_when_the_weight_has_changed_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    casts = CastOnce(linears, torch.bfloat16)
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: copied.append(len(a)) or copy(a, b))
    casts.refresh()
    casts.refresh()
    with torch.no_grad():
        linears[1].weight.detach().view(-1).fill_(2.0)  # as a checkpoint is loaded
    casts.refresh()
    assert copied == [3, 1]
    assert products(torch.ones(1, 8), linears[1])[0, 0] == 16


def test_an_engine_casts_once_in_a_step_and_never_computes_with_an_old_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: copied.append(len(a)) or copy(a, b))
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=Precision.bf16), join())
    engine.prepare(MODEL, OptimConfig(lr=1e-2), seed=0)
    tokens = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(0))
    n_targets = torch.tensor(24.0)
    for _ in range(3):
        for _ in range(4):
            engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets)
        engine.step(1e-2)
    n_matrices = 4 * MODEL.n_layer
    assert copied == 4 * [n_matrices, MODEL.n_layer]  # matrices and A, at the first pass, and after each update
    mixer = engine._bare_model.blocks()[0].mixer
    assert isinstance(mixer, Mamba1Mixer)
    in_proj, ssm = mixer.in_proj, mixer.ssm
    x = torch.randn(1, MODEL.d_model)
    for _ in range(2):
        with engine.compute():
            assert torch.equal(in_proj(x), x.bfloat16() @ in_proj.weight.bfloat16().t())
        assert ssm.derived is not None
        assert torch.equal(ssm.derived.x_proj, ssm.x_proj_weight.bfloat16())
        assert torch.equal(ssm.derived.dt_proj, ssm.dt_proj_weight.bfloat16())
        assert torch.equal(ssm.derived.A, -ssm.A_log.exp())
        with torch.no_grad():
            for piece in engine.pieces().model.values():
                piece.values.mul_(2)


def test_gradients_are_added_in_one_launch_and_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []  # how many gradients each adds to
    add = torch._foreach_add_

    def counted(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        launches.append(len(tensors))
        add(tensors, others)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    found = []
    for at_once in (True, False):
        engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=Precision.bf16), join())
        engine.prepare(MODEL, OptimConfig(lr=1e-2), seed=0)
        if not at_once:
            monkeypatch.setattr(engine, "_added_at_once", nullcontext)
        tokens = torch.randint(0, 31, (3, 2, 13), generator=torch.Generator().manual_seed(0))
        places = []
        for batch in tokens:
            engine.accumulate(batch[:, :-1], batch[:, 1:], None, torch.tensor(72.0))
            places.append([p.grad for p in engine.model.parameters()])
        assert all(a is b is c for a, b, c in zip(*places, strict=True))
        if at_once:
            before = [grad.clone() for grad in places[0]]
            with pytest.raises(RuntimeError, match="on purpose"), engine._added_at_once():
                raise RuntimeError("on purpose")
            assert all(p.grad is kept for p, kept in zip(engine.model.parameters(), places[0], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before, places[0], strict=True))
        found.append([p.grad for p in engine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert engine._casts is not None
    assert launches == 2 * [len(found[0]) - len(engine._casts.linears)]  # in the second and third micro-batch


def test_an_ssm_computes_the_same_with_what_it_is_given() -> None:
    found = []
    for given in (True, False):
        engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=Precision.bf16), join())
        engine.prepare(MODEL, OptimConfig(lr=1e-2), seed=0)
        if not given:
            for block in engine._bare_model.blocks():
                assert isinstance(block.mixer, Mamba1Mixer)
                block.mixer.ssm.derived = None
        tokens = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            for _ in range(2):
                loss = engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(48.0))
            found.append((loss.item(), engine.step(1e-2).grad_norm))
    assert found[:3] == found[3:]
