"""A synthetic task from the command line: it is learned, tested at longer lengths, and shown beside the paper."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_train.model.language_model import MambaLM
from tests.commands.test_generate import mamba_train
from tests.helpers import REPOSITORY, environment, metrics
from tests.model.families import perturbed, small_config

SMALL = [
    *("data.sequence_length=16", "data.vocab_size=6", "training.global_batch_size=32", "training.micro_batch_size=32"),
    *("training.validation_interval_steps=50", "logging.wandb=disabled", "checkpoint.reserve_gib=0", "optim.lr=5e-3"),
    *("model.d_model=32", "schedule.warmup_steps=20"),
]


def train(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "train.py"), *SMALL),
            *(f"run_dir={run_dir}", f"data.cache_dir={run_dir.parent / 'cache'}", *overrides),
        ],
        cwd=run_dir.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_induction_heads_are_learned_and_tested_beyond(tmp_path: Path) -> None:
    lengths = "data.test_lengths=[16,48]"
    result = train(tmp_path / "run", "experiment=induction_heads", "training.total_steps=150", lengths)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "run" / "evaluation" / "task-step_00000150.json").read_text())
    assert found["accuracy"]["16"] > 0.9
    assert set(found["accuracy"]) == {"16", "48"}
    recorded = [record["task/accuracy"] for record in metrics(tmp_path / "run") if "task/accuracy" in record]
    assert recorded[0] < recorded[-1] == pytest.approx(found["accuracy"]["16"], abs=0.05)
    assert (tmp_path / "run" / "evaluation" / "task-step_00000150.png").stat().st_size > 5_000
    assert "the paper: 100%" in result.stdout + result.stderr
    evaluated = mamba_train("evaluate", str(tmp_path / "run"))
    assert evaluated.returncode == 2
    assert "trained on induction_heads, which has no text" in evaluated.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_without_selection_the_same_model_fails_beyond_its_training(tmp_path: Path) -> None:
    accuracy = {}
    for name, value in (("selective", "false"), ("fixed", "true")):
        overrides = (
            "training.total_steps=400",
            "data.test_lengths=[32,128]",
            "data.sequence_length=32",
            "model.d_model=64",
        )
        run_dir = tmp_path / name
        result = train(run_dir, "experiment=induction_heads", *overrides, f"model.time_invariant={value}")
        assert result.returncode == 0, result.stderr
        accuracy[name] = json.loads(next((run_dir / "evaluation").glob("*.json")).read_text())["accuracy"]
    # What is learned without selection are the distances of the training.
    assert accuracy["selective"]["128"] > 0.9
    assert accuracy["fixed"]["128"] < 0.5


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.task=null"], "data.task"),
        (["data.reset_state_at_documents=true"], "data.reset_state_at_documents"),
        (["data.sequence_length=2"], "data.sequence_length=2"),
        (["data.test_lengths=[64,1]"], "data.test_lengths=1"),
        (["data.vocab_size=2"], "data.vocab_size=2"),
        (["data=stdlib", "data.task=mqar"], "data.task=mqar"),
        (["model=mamba2_tiny", "model.time_invariant=true"], "model.time_invariant"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, overrides: list[str], expected: str) -> None:
    result = train(tmp_path / "run", "experiment=induction_heads", *overrides)
    assert result.returncode == 2
    assert expected in result.stderr.strip().splitlines()[-1]


@torch.no_grad()
def test_a_time_invariant_model_reads_delta_B_and_C_of_no_token() -> None:
    """Its SSM is linear in what the convolution gives it, so superposition holds; with selection it does not."""
    for fixed in (True, False):
        model: MambaLM = perturbed(small_config("mamba1", time_invariant=fixed))
        ssm = model.blocks()[0].mixer.ssm
        one, two = torch.randn(2, 1, 12, ssm.D.numel())
        projected = [ssm._project(x) for x in (one, two)]
        same = all(torch.equal(a, b) for a, b in zip(*projected, strict=True))
        assert same is fixed
