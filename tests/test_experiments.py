"""Every recipe composes, and its figures are those its comments state."""

from pathlib import Path

import pytest

from mamba_train.composition import CONF_DIR, compose_config
from mamba_train.config import Config, ScheduleKind

RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("[!_]*.yaml"))
PUBLISHED = [name for name in RECIPES if name.endswith(("_pile", "_slimpajama"))]
NEEDS_NO_TEXT = ("smoke", "induction_heads", "selective_copying", "mqar")
# Peak rates: five times GPT-3's (arXiv 2312.00752, E.2.1 and table 12), three times at 2.7B (mamba issue 144).
GPT3_LR = {"130m": 6e-4, "370m": 3e-4, "780m": 2.5e-4, "790m": 2.5e-4, "1.3b": 2e-4, "1.4b": 2e-4}


@pytest.fixture
def compose(tmp_path: Path):
    """Compose a recipe with the files it asks for; no published one names a tokenizer beside its shards."""
    (tmp_path / "text").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")

    def compose_recipe(name: str, *overrides: str) -> Config:
        places = [] if name in NEEDS_NO_TEXT else [f"data.path={tmp_path / 'text'}"]
        if name == "anneal":
            places += [f"data.tokenizer={tmp_path}/tokenizer.json", f"init_from={tmp_path / 'text'}"]
        return compose_config([f"experiment={name}", *places, *overrides])

    return compose_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_it_composes(name: str, compose) -> None:
    compose(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_the_published_recipes(name: str, compose) -> None:
    config = compose(name)
    tokens_per_step = config.training.global_batch_size * config.data.sequence_length
    tokens = 600e9 if "slimpajama" in name else 300e9
    assert config.training.total_steps * tokens_per_step == pytest.approx(tokens, rel=1e-5)
    assert config.schedule.kind is ScheduleKind.cosine
    assert config.schedule.warmup_steps == pytest.approx(config.training.total_steps / 10, abs=1)
    assert config.schedule.min_lr_ratio * config.optim.lr == pytest.approx(1e-5, rel=2e-3)
    size = name.split("_")[1]
    assert config.optim.lr == pytest.approx(5 * GPT3_LR[size] if size in GPT3_LR else 3 * 1.6e-4)
    assert tokens_per_step == (2**19 if size[-1] == "m" else 2**20)
    assert config.model.vocab_size == 50277
    assert name.startswith(config.model.name)
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)


def test_there_is_one_for_each_published_size() -> None:
    models = {path.stem for path in (CONF_DIR / "model").glob("*.yaml") if not path.stem.endswith("_tiny")}
    assert {name.rsplit("_", 1)[0] for name in PUBLISHED} == models


@pytest.mark.parametrize("name", ["mamba_130m_pile", "anneal"])
def test_what_a_recipe_leaves_open_must_be_given(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path|init_from"):
        compose_config([f"experiment={name}"])
    if name == "anneal":
        with pytest.raises(ValueError, match=r"data\.tokenizer=PATH_TO|init_from=PATH_OR_HUB_NAME"):
            compose_config([f"experiment={name}", f"data.path={tmp_path}"])
    else:
        with pytest.raises(ValueError, match=r"data\.path=.*/none: expected a folder of token shards"):
            compose_config([f"experiment={name}", f"data.path={tmp_path}/none"])
