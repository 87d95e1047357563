"""Out and back again: every tensor bit-equal, and the logits those of the library that loads it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mamba_train.config import ModelConfig
from mamba_train.convert.export import export
from mamba_train.convert.import_run import import_run
from mamba_train.convert.names import Layout, counterparts, from_layout, to_layout
from mamba_train.convert.source import load_pretrained
from mamba_train.convert.verify import logits_of, probe
from mamba_train.model.contract import rule_for
from mamba_train.model.language_model import resolve_model_config
from tests.convert.conftest import MakeRun
from tests.convert.models import ALL, HYBRID, MAMBA1, MAMBA2, MAMBA2_GROUPED, PURE, TRANSFORMER


def silent(line: str) -> None:
    pass


CASES = [(config, Layout.state_spaces) for config in ALL] + [(config, Layout.transformers) for config in PURE]


@pytest.mark.parametrize(("config", "layout"), CASES, ids=lambda value: getattr(value, "name", str(value)))
@torch.no_grad()
def test_every_weight_comes_back_bit_by_bit(
    config: ModelConfig, layout: Layout, make_run: MakeRun, tmp_path: Path
) -> None:
    run_dir = make_run(config)
    before = load_pretrained(run_dir, silent)
    lines: list[str] = []
    export(run_dir, tmp_path / "out", layout, lines.append)
    import_run(tmp_path / "out", tmp_path / "again", lines.append)
    after = load_pretrained(tmp_path / "again", silent)
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype is torch.float32
        assert torch.equal(after.tensors[name], tensor), name
    assert after.tokenizer == before.tokenizer
    # What is computed is the same, too: the config came back.
    tokens = probe(before.config)
    expected = logits_of(before.config, before.tensors, tokens)
    assert torch.equal(logits_of(after.config, after.tensors, tokens), expected)
    loader = "transformers" if layout is Layout.transformers else "our importer"
    assert f"loaded back by {loader}: weights bit-equal" in lines[-2]
    if layout is Layout.state_spaces:  # transformers does not tell padding from vocabulary
        kept = {field.name for field in dataclasses.fields(config)} - {"name", "mixer", "attention_layers"}
        if before.config.attention_heads:
            kept -= {"d_state", "d_conv", "expand", "dt_rank"}
        assert {key: getattr(after.config, key) for key in kept} == {key: getattr(before.config, key) for key in kept}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=lambda config: config.name)
def test_a_bf16_file_gives_fp32_masters(config: ModelConfig, layout: Layout, make_run: MakeRun) -> None:
    pretrained = load_pretrained(make_run(config), silent)
    published = to_layout(pretrained.tensors, pretrained.config, layout)
    rounded = {name: tensor.bfloat16() for name, tensor in published.items()}
    masters = from_layout(rounded, pretrained.config, layout)
    for name, tensor in masters.items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, pretrained.tensors[name].bfloat16().float())


def test_all_sensitive_parameters_leave_in_fp32(make_run: MakeRun, tmp_path: Path) -> None:
    from mamba_train.convert.files import read_weights

    for config in (MAMBA1, MAMBA2):
        for layout in Layout:
            out = tmp_path / f"{config.name}-{layout}"
            export(make_run(config, f"run-{config.name}-{layout}"), out, layout, silent)
            stored = read_weights(out)
            resolved = resolve_model_config(config, 317)
            sensitive = [row for row in counterparts(resolved, layout) if rule_for(row.ours).fp32_forward]
            assert len(sensitive) == 3 * config.n_layer
            assert all(stored[row.theirs].dtype is torch.float32 for row in sensitive)


@pytest.mark.parametrize("config", PURE, ids=lambda config: config.name)
@torch.no_grad()
def test_logits_of_transformers_and_every_weight_matters(
    config: ModelConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    """An independent check of what the command checks: any weight that is moved is seen by both alike."""
    transformers = pytest.importorskip("transformers")
    run_dir = make_run(config)
    export(run_dir, tmp_path / "out", Layout.transformers, silent)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pretrained = load_pretrained(run_dir, silent)
    tokens = torch.randint(0, 317, (2, 48), generator=torch.Generator().manual_seed(0))

    def difference() -> float:
        theirs = model(tokens).logits
        return float(
            (logits_of(pretrained.config, pretrained.tensors, tokens) - theirs).abs().max() / theirs.abs().max()
        )

    assert difference() < 1e-4
    stored = dict(model.named_parameters())
    for row in counterparts(pretrained.config, Layout.transformers):
        moved = 0.05 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1))
        pretrained.tensors[row.ours] += moved
        assert difference() > 1e-4, row.ours
        stored[row.theirs] += moved.reshape(row.their_shape)
        assert difference() < 1e-4, row.ours


def test_the_tokenizer_loads_in_transformers(make_run: MakeRun, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(make_run(MAMBA1), tmp_path / "out", Layout.transformers, silent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "some more text"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == 0
    assert config["use_bias"] is False
    assert config["vocab_size"] == 320


def test_a_tied_matrix_is_where_each_library_looks_for_it(make_run: MakeRun, tmp_path: Path) -> None:
    """mamba_ssm loads strictly and ties afterwards; transformers stores a tied matrix once."""
    from mamba_train.convert.files import read_weights

    run_dir = make_run(MAMBA1)
    for layout in Layout:
        export(run_dir, tmp_path / layout, layout, silent)
    strict = read_weights(tmp_path / Layout.state_spaces)
    assert torch.equal(strict["lm_head.weight"], strict["backbone.embedding.weight"])
    assert (tmp_path / Layout.state_spaces / "pytorch_model.bin").stat().st_size < 1.1 * sum(
        tensor.numel() * 4 for name, tensor in strict.items() if name != "lm_head.weight"
    ) + 50_000, "the matrix is stored once"
    assert "lm_head.weight" not in read_weights(tmp_path / Layout.transformers)


def test_the_card_states_recipe_and_data(make_run: MakeRun, tmp_path: Path) -> None:
    export(make_run(MAMBA1), tmp_path / "out", Layout.state_spaces, silent)
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "# m1",
        "library_name: mamba_ssm",
        "weights bit-equal",
        "| `optim.lr` | 0.001 |",
        "| `sequence_length` | 32 |",
        "After 7 of 10 steps of 128 tokens",
    ):
        assert expected in card


def test_one_checkpoint_of_a_run_can_be_exported(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run(MAMBA1)
    export(run_dir / "checkpoints" / "step_00000007", tmp_path / "out", Layout.state_spaces, silent)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run_dir / "tokenizer.json").read_bytes()


def test_groups_are_warned_of(make_run: MakeRun, tmp_path: Path) -> None:
    lines: list[str] = []
    export(make_run(MAMBA2_GROUPED), tmp_path / "out", Layout.transformers, lines.append)
    assert "n_groups=4" in lines[0]
    assert "each group" in lines[0]


@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=lambda config: config.name)
def test_transformers_has_no_class_for_hybrids(config: ModelConfig, make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no class for a model with attention or MLPs; use --layout state-spaces"):
        export(make_run(config), tmp_path / "out", Layout.transformers, silent)
    assert not (tmp_path / "out").exists()
