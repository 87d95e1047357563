"""The audit must stop a run, naming the parameter, whenever the contract is broken on purpose."""

import pytest
import torch
from torch import nn

from mamba_train.composition import compose_config
from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model import language_model
from mamba_train.model.contract import RULES
from mamba_train.model.selective_ssm import SelectiveSSM
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import join
from mamba_train.training.audit import ARGUMENT_OF_ROLE, ContractViolation, audit, format_audit
from tests.model.families import small_config

MODEL = language_model.resolve_model_config(
    ModelConfig(name="test", n_layer=2, d_model=32, d_state=4), tokenizer_vocab_size=31
)


def make_engine(precision: Precision = Precision.fp32, seed: int = 0) -> NativeEngine:
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=precision), join())
    engine.prepare(MODEL, OptimConfig(lr=1e-3), seed=seed)
    return engine


def make_model_engine(family: str, precision: Precision = Precision.bf16, **changes: object) -> tuple:
    """An engine with a model wide enough for its heads to show a distribution."""
    config = small_config(family, d_model=80, head_dim=4, n_groups=1, **changes)
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=precision), join())
    engine.prepare(config, OptimConfig(lr=1e-3), seed=0)
    return engine, config


@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny", "hybrid_tiny", "transformerpp_130m"])
def test_the_models_of_conf_pass(name: str) -> None:
    model = compose_config([f"model={name}"]).model
    if name.startswith("transformer"):
        model.n_layer = 2
    config = language_model.resolve_model_config(model, tokenizer_vocab_size=300)
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=Precision.bf16), join())
    engine.prepare(config, OptimConfig(lr=1e-3), seed=0)
    rows = audit(engine, config, fresh=True)
    n_layers = {"hybrid_tiny": 3, "transformerpp_130m": 0}.get(name, 4)
    assert [row.n_parameters for row in rows] == [n_layers] * (3 if n_layers else 0)
    assert ("no SSM parameters" in format_audit(rows)) == (n_layers == 0)


@pytest.mark.parametrize("name", ["A_log", "D", "dt_bias"])
def test_a_cast_on_the_way_to_ssd_is_caught_by_the_layers_name(name: str) -> None:
    """In a hybrid the second scan belongs to the third layer."""
    engine, config = make_model_engine("hybrid")
    audit(engine, config, fresh=True)
    module = ssm(engine, 2)
    with torch.no_grad():
        getattr(module, name).mul_(1.001234)
    stored = getattr(module, name)

    def rounded_forward(*args, **kwargs):
        del module._parameters[name]
        module._parameters[name] = nn.Parameter(stored.detach().bfloat16().float(), requires_grad=False)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            module._parameters[name] = stored

    module.forward = rounded_forward
    with pytest.raises(ContractViolation, match=rf"layers\.2\.mixer\.ssm\.{name} reaches the scan"):
        audit(engine, config, fresh=False)


@pytest.mark.parametrize(
    "A",
    [torch.full((40,), 4.0), torch.arange(1.0, 41.0), torch.logspace(0, 1.204, 40), torch.linspace(1, 8, 40)],
    ids=["constant", "1 to n", "log-uniform", "half of the range"],
)
def test_a_wrong_a_of_mamba2_is_caught(A: torch.Tensor) -> None:
    """1 to the number of heads is what another implementation starts from."""
    engine, config = make_model_engine("mamba2")
    audit(engine, config, fresh=True)
    with torch.no_grad():
        for layer in range(3):
            ssm(engine, layer).A_log.copy_(A.log())
    with pytest.raises(ContractViolation, match=r"exp\(layers\.\d\.mixer\.ssm\.A_log\)"):
        audit(engine, config, fresh=True)


def test_a_wrong_dt_bias_is_caught_even_in_the_tiny_hybrid() -> None:
    config = language_model.resolve_model_config(compose_config(["model=hybrid_tiny"]).model, tokenizer_vocab_size=300)
    engine = NativeEngine(EngineConfig(device=DeviceKind.cpu, precision=Precision.fp32), join())
    engine.prepare(config, OptimConfig(lr=1e-3), seed=0)
    for dt in (torch.full((16,), 0.01), torch.linspace(0.001, 0.1, 16)):
        with torch.no_grad():
            for layer in (0, 1, 3):
                ssm(engine, layer).dt_bias.copy_(inverse_softplus(dt))
        with pytest.raises(ContractViolation, match="dt_bias"):
            audit(engine, config, fresh=True)


def ssm(engine: NativeEngine, layer: int = 1) -> SelectiveSSM:
    return engine.model.layers[layer].mixer.ssm


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("seed", range(5))
def test_a_fresh_model_passes(precision: Precision, seed: int) -> None:
    rows = audit(make_engine(precision, seed), MODEL, fresh=True)
    assert [str(row.role) for row in rows] == ["A_log", "D", "dt_bias"]
    assert all(row.received is torch.float32 and row.weight_decay == 0 for row in rows)
    assert "A_log" in format_audit(rows)


def test_a_trained_model_passes_when_it_is_not_fresh() -> None:
    engine = make_engine()
    with torch.no_grad():
        ssm(engine).dt_bias += 1
        ssm(engine).A_log += 0.3
        ssm(engine).D -= 0.2
    audit(engine, MODEL, fresh=False)
    with pytest.raises(ContractViolation):
        audit(engine, MODEL, fresh=True)


@pytest.mark.parametrize("name", ["A_log", "D", "dt_bias"])
def test_a_stored_cast_is_caught(name: str) -> None:
    engine = make_engine()
    parameter = getattr(ssm(engine), name)
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(ContractViolation, match=rf"layers\.1\.mixer\.ssm\.{name} is stored in torch\.bfloat16"):
        audit(engine, MODEL, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("upcast_again", [False, True])
@pytest.mark.parametrize("name", ["A_log", "D", "dt_bias"])
def test_a_cast_on_the_way_to_the_scan_is_caught(name: str, upcast_again: bool, fresh: bool) -> None:
    """As a mixed-precision wrapper does it: fp32 is stored, the forward pass gets a rounded copy."""
    engine = make_engine()
    module = ssm(engine)
    stored = getattr(module, name)

    def swap(value: object) -> None:
        del module._parameters[name]
        module._parameters[name] = value

    def rounded_forward(*args, **kwargs):
        value = stored.detach().bfloat16()
        swap(nn.Parameter(value.float() if upcast_again else value, requires_grad=False))
        try:
            return SelectiveSSM.forward(module, *args, **kwargs)
        finally:
            swap(stored)

    module.forward = rounded_forward
    with pytest.raises(ContractViolation, match=rf"layers\.1\.mixer\.ssm\.{name} reaches the scan"):
        audit(engine, MODEL, fresh=fresh)


def test_the_audit_changes_nothing() -> None:
    engine = make_engine()
    (model, optimizer), state = whole_state(engine), engine.pieces().all()
    audit(engine, MODEL, fresh=True)
    assert all(torch.equal(value.view(-1), state[name].values) for name, value in {**model, **optimizer}.items())


def test_rounded_moments_are_caught() -> None:
    engine = make_engine()
    engine.backward(engine.model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)))
    engine.step(1e-3)
    audit(engine, MODEL, fresh=False)
    moments = engine._optimizer.state[ssm(engine).A_log]
    moments["exp_avg"] = moments["exp_avg"].bfloat16()
    with pytest.raises(ContractViolation, match=r"layers\.1\.mixer\.ssm\.A_log\.exp_avg is stored in torch\.bfloat16"):
        audit(engine, MODEL, fresh=False)


def test_every_role_that_the_table_keeps_in_fp32_is_looked_at() -> None:
    assert {rule.role for rule in RULES if rule.fp32_forward} == set(ARGUMENT_OF_ROLE)


def test_weight_decay_on_an_ssm_parameter_is_caught() -> None:
    engine = make_engine()
    decayed, undecayed = engine._optimizer.param_groups
    index = next(i for i, p in enumerate(undecayed["params"]) if p is ssm(engine, 0).A_log)
    decayed["params"].append(undecayed["params"].pop(index))
    with pytest.raises(ContractViolation, match=r"layers\.0\.mixer\.ssm\.A_log has weight decay"):
        audit(engine, MODEL, fresh=True)


def test_a_parameter_in_no_group_or_two_is_caught() -> None:
    engine = make_engine()
    lost = engine._optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ContractViolation, match="in no optimiser group"):
        audit(engine, MODEL, fresh=True)
    engine._optimizer.param_groups[0]["params"] += [lost, lost]
    with pytest.raises(ContractViolation, match="in two optimiser groups"):
        audit(engine, MODEL, fresh=True)


def inverse_softplus(dt: torch.Tensor) -> torch.Tensor:
    return dt + torch.log(-torch.expm1(-dt))


@pytest.mark.parametrize(
    "dt",
    [
        torch.full((64,), 0.01),
        torch.linspace(0.001, 0.1, 64),
        torch.ones(64) * 0.6931472,  # what a zero Δ bias gives
        torch.logspace(-2, -1, 64),
    ],
    ids=["constant", "uniform", "zero", "half of the range"],
)
@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_a_wrong_dt_bias_is_caught(dt: torch.Tensor, layers: list[int]) -> None:
    engine = make_engine()
    with torch.no_grad():
        for layer in layers:
            ssm(engine, layer).dt_bias.copy_(inverse_softplus(dt))
    with pytest.raises(ContractViolation, match=rf"layers\.[{layers[0]}{layers[-1]}]\.mixer\.ssm\.dt_bias"):
        audit(engine, MODEL, fresh=True)


def test_a_wrong_a_log_or_d_is_caught() -> None:
    engine = make_engine()
    with torch.no_grad():
        ssm(engine).A_log[3, 2] += 0.01
    with pytest.raises(ContractViolation, match=r"layers\.1\.mixer\.ssm\.A_log does not start"):
        audit(engine, MODEL, fresh=True)
    engine = make_engine()
    with torch.no_grad():
        ssm(engine).D[5] = 0
    with pytest.raises(ContractViolation, match=r"layers\.1\.mixer\.ssm\.D does not start"):
        audit(engine, MODEL, fresh=True)
