"""`mamba-train doctor`: exit code 0 only if a run would start."""

import argparse
import subprocess
from pathlib import Path

import pytest
import torch

from mamba_train.commands import doctor
from mamba_train.monitor import self_test
from tests.distributed.launch import child_environment, torchrun


def call(*overrides: str) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    doctor.run(parser.parse_args(["engine.device=cpu", *overrides]))


def test_one_screen_about_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(f"run_dir={tmp_path / 'run'}", "model.n_layer=1")
    printed = capsys.readouterr().out
    for expected in ("torch 2", "engine=single", "wandb:", f"run_dir={tmp_path / 'run'}", "a run would start"):
        assert expected in printed
    for operator in self_test.OPERATORS:
        assert f"\n{operator}" in printed
    assert len(printed.splitlines()) < 30
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_operator_is_named(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator that is right in fp64, which is the judge, and wrong in what the run computes with."""
    make, right = self_test.OPERATORS["ssd"]

    def wrong(inputs: self_test.Inputs) -> torch.Tensor:
        scale = 1.0 if inputs["x"].dtype is torch.float64 else 1.1
        return right({**inputs, "D": inputs["D"] * scale})

    monkeypatch.setitem(self_test.OPERATORS, "ssd", (make, wrong))
    precision = "fp32" if dtype is torch.float32 else "bf16"
    with pytest.raises(ValueError, match="a run would not start: ssd is wrong on cpu"):
        call(f"run_dir={tmp_path / 'run'}", f"engine.precision={precision}")
    assert capsys.readouterr().out.count("WRONG") == 1


def test_an_operator_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make, _ = self_test.OPERATORS["ssd"]
    monkeypatch.setitem(self_test.OPERATORS, "ssd", (make, lambda inputs: 1 / 0))
    with pytest.raises(ValueError, match=r"ssd is wrong .* \(ZeroDivisionError: division by zero\)"):
        call(f"run_dir={tmp_path / 'run'}")


def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a checkpoint and the reserve need"):
        call(f"run_dir={tmp_path / 'run'}", "checkpoint.reserve_gib=1e6")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=local", "data.path=/no/such/text"], "data.path=/no/such/text: there is no such file"),
        (["data=local"], "data.path=None: expected a folder"),
        (["init_from=/no/such/run"], "init_from=/no/such/run: there is no such folder"),
        (["data.tokenizer=/no/tokenizer.json"], "data.tokenizer=/no/tokenizer.json"),
    ],
)
def test_a_run_without_its_inputs_would_not_start(
    overrides: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"a run would not start: .*{said}"):
        call(f"run_dir={tmp_path / 'run'}", *overrides)
    assert "wandb:" in capsys.readouterr().out, "the machine is looked at all the same"


def test_wandb_that_must_be_online_needs_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="wandb has no login"):
        call(f"run_dir={tmp_path / 'run'}", "logging.wandb=online")


@pytest.mark.slow
def test_of_several_ranks_one_speaks_and_the_all_reduce_is_measured(tmp_path: Path) -> None:
    command = torchrun(2, "-m", "mamba_train", "doctor", "engine=fsdp", "engine.device=cpu", f"run_dir={tmp_path}")
    command += ["training.micro_batch_size=1"]
    result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "all-reduce of 16 MiB over 2 ranks" in result.stdout
    assert result.stdout.count("a run would start") == 1
