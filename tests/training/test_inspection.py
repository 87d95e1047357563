"""Profiler traces of chosen steps, and the snapshot of a GPU that ran out of memory."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.inspection import MemorySnapshotHook
from tests.helpers import metrics
from tests.training.test_trainer import make_config


def test_chosen_steps_are_traced_and_layers_have_norms(tmp_path: Path, corpus: Path) -> None:
    settings = ("training.total_steps=6", "logging.profile_steps=[2,3,99]", "engine.layer_grad_norms=true")
    build_trainer(make_config(tmp_path / "run", corpus, *settings)).run()
    traces = sorted((tmp_path / "run" / "profiles").iterdir())
    assert [path.name for path in traces] == [f"step_0000000{n}.rank_00000.json.gz" for n in (2, 3)]
    with gzip.open(traces[0], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "mamba_train::selective_scan" in names
    for record in metrics(tmp_path / "run"):
        parts = [value for key, value in record.items() if key.startswith("grad_norm/")]
        assert len(parts) == 4
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-4)


def test_a_trace_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profiles").write_text("a file in the place of the folder")
    settings = ("training.total_steps=6", "logging.profile_steps=[1,2]", "logging.progress=plain")
    build_trainer(make_config(tmp_path / "run", corpus, *settings)).run()
    assert len(metrics(tmp_path / "run")) == 6
    assert capsys.readouterr().out.count("warning: not written") == 2


def test_only_a_gpu_that_ran_out_of_memory_leaves_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    hook = MemorySnapshotHook(tmp_path, 3, torch.device("cuda"), lambda text: None)
    hook.close(failed=False)
    for error in (ValueError("no"), torch.OutOfMemoryError("CUDA out of memory")):
        try:
            raise error
        except Exception:
            hook.close(failed=True)
    assert written == [str(tmp_path / "profiles" / "out_of_memory.rank_00003.pickle")]
