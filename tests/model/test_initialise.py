import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.config import ModelConfig
from mamba_train.model.contract import RULES, decay_split, rule_for
from mamba_train.model.initialise import draw, initialise_
from mamba_train.model.language_model import MambaLM
from tests.model.families import FAMILIES, small_config


def initial(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    model = MambaLM(config)
    initialise_(model, config, seed)
    return model.state_dict()


def test_every_parameter_is_drawn(config: ModelConfig) -> None:
    """Whatever was in the memory is gone: two models filled with different rubbish become equal."""
    models = []
    for rubbish in (math.nan, 7.0):
        model = MambaLM(config)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, rubbish)
        initialise_(model, config, seed=0)
        models.append(model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        assert value.isfinite().all(), name


def test_meta_device_and_direct_construction_give_the_same_bits(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MambaLM(config)
    model.to_empty(device="cpu")
    initialise_(model, config, seed=0)
    direct = initial(config)
    assert all(torch.equal(value, direct[name]) for name, value in model.state_dict().items())


def test_a_draw_depends_on_the_seed_and_its_own_name_only(config: ModelConfig) -> None:
    torch.manual_seed(1)
    before = initial(config)
    torch.manual_seed(2)
    config.n_layer += 1
    deeper = initial(config)
    for name, value in before.items():
        if not name.endswith("out_proj.weight"):  # scaled by the number of layers
            assert torch.equal(value, deeper[name]), name
    other_seed = initial(config, seed=1)
    assert not torch.equal(other_seed["embedding.weight"], deeper["embedding.weight"])
    assert not torch.equal(deeper["layers.0.mixer.in_proj.weight"], deeper["layers.1.mixer.in_proj.weight"])


def test_another_process_draws_the_same_bits(config: ModelConfig) -> None:
    script = (
        "import torch; from mamba_train.config import ModelConfig; from mamba_train.model.initialise import draw;"
        "print(draw('layers.0.mixer.ssm.dt_bias', torch.Size([64]),"
        " ModelConfig(name='x', n_layer=1, d_model=8), 5).double().sum().item().hex())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    here = draw("layers.0.mixer.ssm.dt_bias", torch.Size([64]), ModelConfig(name="x", n_layer=1, d_model=8), 5)
    assert printed.strip() == here.double().sum().item().hex()


def test_distributions(config: ModelConfig) -> None:
    config.d_model, config.dt_rank, config.vocab_size = 256, 16, 2000
    values = initial(config)
    mixer = "layers.1.mixer."
    d_inner = 512
    assert values["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(values[mixer + "ssm.D"], torch.ones(d_inner))
    assert torch.equal(values["layers.1.norm.weight"], torch.ones(256))
    expected_A = torch.arange(1.0, 7.0).expand(d_inner, 6)
    torch.testing.assert_close(values[mixer + "ssm.A_log"].exp(), expected_A)
    bounds = {
        "in_proj.weight": 1 / math.sqrt(256),
        "ssm.conv_weight": 1 / math.sqrt(4),
        "ssm.conv_bias": 1 / math.sqrt(4),
        "ssm.x_proj_weight": 1 / math.sqrt(d_inner),
        "ssm.dt_proj_weight": 1 / math.sqrt(16),
        "out_proj.weight": 1 / math.sqrt(d_inner) / math.sqrt(3),
    }
    for name, bound in bounds.items():
        value = values[mixer + name]
        assert value.abs().max().item() == pytest.approx(bound, rel=0.02), name
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08), name
    log_dt = torch.nn.functional.softplus(values[mixer + "ssm.dt_bias"]).log()
    low, high = math.log(1e-3), math.log(1e-1)
    quantiles = torch.quantile(log_dt, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quantiles, torch.linspace(low, high, 5), rtol=0, atol=0.25)


def test_buffers_and_unknown_names_are_refused(config: ModelConfig) -> None:
    model = MambaLM(config)
    model.register_buffer("table", torch.zeros(3))
    with pytest.raises(RuntimeError, match="buffer table"):
        initialise_(model, config, seed=0)
    with pytest.raises(KeyError, match="covered by 0 rules"):
        rule_for("layers.0.mixer.ssm.mystery")


def test_each_parameter_has_one_rule_and_each_rule_a_parameter() -> None:
    used = set()
    for family in FAMILIES:
        names = [name for name, _ in MambaLM(small_config(family, tie_embeddings=False)).named_parameters()]
        used |= {rule_for(name) for name in names}
        decayed, undecayed = decay_split(names)
        assert sorted(decayed + undecayed) == sorted(names)
        for name in names:
            one_dimensional_or_ssm = name.endswith(("A_log", "D", "dt_bias", "conv_bias", "norm.weight", "norm_weight"))
            assert (name in undecayed) == one_dimensional_or_ssm
    assert used == set(RULES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn_whole_and_finite(family: str) -> None:
    config = small_config(family)
    model = MambaLM(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    initialise_(model, config, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_mamba2_draws_a_uniformly_and_the_rest_as_mamba1() -> None:
    config = small_config("mamba2", d_model=400, A_init_min=2.0, A_init_max=9.0)
    values = initial(config)
    ssm = "layers.2.mixer.ssm."
    A = values[ssm + "A_log"].exp()
    assert A.shape == (80,)
    quantiles = torch.quantile(A, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quantiles, torch.linspace(2, 9, 5), rtol=0, atol=1.2)
    assert A.min() >= 2 * 0.999
    assert A.max() <= 9 * 1.001
    dt = torch.nn.functional.softplus(values[ssm + "dt_bias"])
    assert 0.001 * 0.999 <= dt.min() < 0.003
    assert 0.03 < dt.max() <= 0.1 * 1.001
    assert torch.equal(values[ssm + "D"], torch.ones(80))
    assert torch.equal(values[ssm + "norm_weight"], torch.ones(800))
    assert values[ssm + "conv_weight"].abs().max().item() == pytest.approx(0.5, rel=0.02)


def test_output_projections_shrink_with_the_number_of_residual_branches() -> None:
    """A layer with an MLP has two, so both projections are scaled by 1/sqrt(2 n_layer)."""
    for family, branches in {"mamba2": 3, "transformer": 6, "mamba1_mlp": 6}.items():
        config = small_config(family, d_model=200)
        for name, value in initial(config).items():
            if name.endswith("out_proj.weight"):
                bound = 1 / math.sqrt(value.shape[1]) / math.sqrt(branches)
                assert value.abs().max().item() == pytest.approx(bound, rel=0.02), (family, name)


def test_the_convolution_of_attention_has_its_own_width() -> None:
    values = initial(small_config("hybrid"))
    for name in ("conv_weight", "conv_bias"):
        assert values[f"layers.1.mixer.{name}"].abs().max().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), layer=st.integers(0, 100))
def test_dt_stays_in_its_range_for_any_seed(seed: int, layer: int) -> None:
    config = ModelConfig(name="x", n_layer=1, d_model=8, dt_min=0.003, dt_max=0.2)
    dt_bias = draw(f"layers.{layer}.mixer.ssm.dt_bias", torch.Size([300]), config, seed)
    dt = torch.nn.functional.softplus(dt_bias)
    assert 0.003 * 0.999 <= dt.min() <= dt.max() <= 0.2 * 1.001
