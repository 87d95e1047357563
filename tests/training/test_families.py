"""Runs of the other families: they learn, report the right layers, and resume."""

import math
from pathlib import Path

import pytest

from mamba_train.training.build import build_trainer
from tests.helpers import curve, metrics
from tests.training.test_trainer import make_config

# TINY_RUN has two layers of width 32; the first one attends in the hybrid.
FAMILIES = {
    "mamba2": ["model=mamba2_tiny", "model.chunk_size=8"],
    "hybrid": ["model=hybrid_tiny", "model.attention_layers=[0]", "model.d_intermediate=32"],
    "transformer": ["model=transformerpp_130m", "model.attention_heads=2", "model.d_intermediate=64"],
}
SSM_LAYERS = {"mamba2": {"layer_00", "layer_01"}, "hybrid": {"layer_01"}, "transformer": set()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_and_reports_its_ssm_layers(tmp_path: Path, corpus: Path, family: str) -> None:
    config = make_config(tmp_path / "run", corpus, *FAMILIES[family], "training.total_steps=40")
    build_trainer(config).run()
    records = metrics(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"] - 1.0
    assert all(math.isfinite(record["loss"]) and record["mfu"] > 0 for record in records)
    layers = {key.split("/")[1] for record in records for key in record if key.startswith("ssm/")}
    assert layers == SSM_LAYERS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_bit_equal(tmp_path: Path, corpus: Path, family: str) -> None:
    options = [*FAMILIES[family], "schedule=constant", "schedule.warmup_steps=0"]
    for name, lengths in {"whole": [20], "parts": [10, 20]}.items():
        for total in lengths:
            steps = f"training.total_steps={total}"
            build_trainer(make_config(tmp_path / name, corpus, *options, steps)).run()
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
