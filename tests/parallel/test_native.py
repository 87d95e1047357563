import math

import pytest
import torch

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.model.observe import observe_scans
from mamba_train.parallel import native
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.state import load_weights, whole_state
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=16, d_state=4), tokenizer_vocab_size=31)
OPTIM = OptimConfig(lr=1e-2, max_grad_norm=0.5)


def make_engine(**settings: object) -> NativeEngine:
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, **settings), join())
    engine.prepare(MODEL, OPTIM, seed=0)
    return engine


def run_backward(engine: NativeEngine, seed: int = 0, scale: float = 1.0) -> float:
    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(seed))
    with engine.compute():
        loss = engine.model(tokens[:, :-1], tokens[:, 1:]) / 22 * scale
    engine.backward(loss)
    return loss.item()


def flat(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Copies of weights and optimiser state."""
    model, optimizer = whole_state(engine)
    return {**model, **optimizer}


def test_loss_falls_and_the_norm_is_that_of_all_gradients() -> None:
    engine = make_engine()
    losses = []
    for _ in range(30):
        losses.append(run_backward(engine))
        expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in engine.model.parameters()))
        result = engine.step(1e-2)
        assert result.grad_norm == pytest.approx(expected, rel=1e-5)
        assert not result.skipped
        assert all(p.grad is None for p in engine.model.parameters())
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("scale", [100.0, 0.01])
def test_clipping_bounds_the_gradient_that_adam_sees(scale: float) -> None:
    engine = make_engine()
    run_backward(engine, scale=scale)
    norm = engine.step(1e-2).grad_norm
    assert (norm > OPTIM.max_grad_norm) == (scale > 1)
    moments = [v for k, v in flat(engine).items() if k.endswith(".exp_avg")]
    seen = math.sqrt(sum(m.square().sum().item() for m in moments)) / (1 - OPTIM.beta1)
    assert seen == pytest.approx(min(norm, OPTIM.max_grad_norm), rel=1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_step_that_is_not_finite_changes_nothing(poison: float, steps_before: int) -> None:
    engine, undisturbed = make_engine(), make_engine()
    for seed in range(steps_before):
        for one in (engine, undisturbed):
            run_backward(one, seed)
            one.step(1e-2)
    before = flat(engine)
    run_backward(engine, seed=8)
    next(iter(engine.model.parameters())).grad[0, 0] = poison
    result = engine.step(1e-2)
    assert result.skipped
    after = flat(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Nothing lingers: the next step is the one that would have come without the bad one.
    for one in (engine, undisturbed):
        run_backward(one, seed=9)
        one.step(1e-2)
    ours, theirs = flat(engine), flat(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_state_round_trip_continues_bit_by_bit() -> None:
    engine = make_engine()
    for seed in range(3):
        run_backward(engine, seed)
        engine.step(1e-2)
    saved = flat(engine)
    kept = {key: value.clone() for key, value in saved.items()}
    other = make_engine()
    for name, piece in other.pieces().all().items():
        piece.values.copy_(piece.of(saved[name]))
    for one in (engine, other):
        run_backward(one, seed=5)
        one.step(2e-3)
    a, b = flat(engine), flat(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    # The saved copy is a copy: neither engine's later step reached it.
    assert all(torch.equal(kept[key], saved[key]) for key in kept)


def test_weights_alone_leave_the_optimiser_as_it_was() -> None:
    engine, other = make_engine(), make_engine()
    run_backward(engine)
    engine.step(1e-2)
    weights, _ = whole_state(engine)
    load_weights(other, weights)
    assert all(torch.equal(flat(other)[name], value) for name, value in weights.items())
    assert all(not flat(other)[key].any() for key in other.pieces().optimizer)


def test_accumulation_equals_the_whole_batch() -> None:
    whole, halves = make_engine(), make_engine()
    tokens = torch.randint(0, 31, (4, 12), generator=torch.Generator().manual_seed(0))
    whole.backward(whole.model(tokens[:, :-1], tokens[:, 1:]) / 44)
    for half in tokens.split(2):
        halves.backward(halves.model(half[:, :-1], half[:, 1:]) / 44)
    assert whole.step(1e-2).grad_norm == pytest.approx(halves.step(1e-2).grad_norm, rel=1e-5)
    for name, value in flat(whole).items():
        torch.testing.assert_close(value, flat(halves)[name], rtol=1e-4, atol=1e-5)


def test_bf16_computes_in_bf16_over_fp32_masters() -> None:
    engine = make_engine(precision=Precision.bf16)
    seen = []
    engine.model.layers[0].mixer.in_proj.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    for _ in range(20):
        last = run_backward(engine)
        assert all(p.grad.dtype is torch.float32 for p in engine.model.parameters())
        engine.step(1e-2)
    assert set(seen) == {torch.bfloat16}
    assert last < 3.0
    assert all(value.dtype is torch.float32 for value in flat(engine).values())


@pytest.mark.parametrize(
    ("policy", "layers", "scans_again"),
    [
        ("auto", None, 0),
        ("none", None, 0),
        ("scan", None, 2),
        ("scan", 1, 1),
        ("layer", None, 2),
        ("keep_scan", None, 0),
    ],
)
def test_the_scan_is_computed_again_only_where_the_policy_says(
    policy: str, layers: int | None, scans_again: int
) -> None:
    engine = make_engine(recompute=Recompute(policy), recompute_layers=layers)
    tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = engine.model(tokens[:, :-1], tokens[:, 1:])
    with observe_scans() as calls:
        engine.backward(loss)
    assert len(calls) == scans_again
    plain = make_engine()
    plain.backward(plain.model(tokens[:, :-1], tokens[:, 1:]))
    expected = dict(plain.model.named_parameters())
    assert all(torch.equal(p.grad, expected[name].grad) for name, p in engine.model.named_parameters())


def test_each_layer_is_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_compiler", lambda: True)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call.__self__) or call)
    engine = make_engine(compile=True)
    assert compiled == engine._bare_model.blocks()


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"engine\.device=cuda"):
        NativeEngine(EngineConfig(device=DeviceKind.cuda), join())
