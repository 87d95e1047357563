"""Every published size, with two layers: names, shapes and configs through both layouts and back."""

from pathlib import Path

import pytest
import torch

from mamba_train.composition import CONF_DIR, compose_config
from mamba_train.convert.export import export
from mamba_train.convert.names import Layout
from mamba_train.convert.source import load_pretrained
from tests.convert.conftest import MakeRun

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("model", MODELS)
def test_round_trip(model: str, layout: Layout, make_run: MakeRun, tmp_path: Path) -> None:
    layers = ["model.n_layer=2"]
    if "attn" in model or "hybrid" in model:
        layers.append("model.attention_layers=[1]")
    config = compose_config([f"model={model}", *layers, "model.vocab_size=1003", "data.vocab_size=1003"]).model
    run_dir = make_run(config)
    if layout is Layout.transformers and any(word in model for word in ("attn", "hybrid", "transformer")):
        with pytest.raises(ValueError, match="no class"):
            export(run_dir, tmp_path / "out", layout, print)
        return
    # The command itself compares the logits, in fp32, with those of transformers.
    lines: list[str] = []
    export(run_dir, tmp_path / "out", layout, lines.append)
    assert "weights bit-equal" in lines[-1]
    before, after = load_pretrained(run_dir, print), load_pretrained(tmp_path / "out", print)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
