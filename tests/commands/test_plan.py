"""`mamba-train plan`: its figures are those of the model that would be built."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_train.commands import plan
from mamba_train.composition import CONF_DIR
from tests.helpers import REPOSITORY, environment


def call(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    plan.run(parser.parse_args(arguments))


# Published counts of the released weights, tied matrices counted once.
PUBLISHED = {
    "mamba_130m_pile": 129_135_360,
    "mamba_370m_pile": 371_516_416,
    "mamba_790m_pile": 793_204_224,
    "mamba_1.4b_pile": 1_372_178_432,
    "mamba_2.8b_pile": 2_768_345_600,
}


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF_DIR / "experiment").glob("[!_]*.yaml")))
def test_every_experiment_can_be_planned(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(f"experiment={experiment}")
    printed = capsys.readouterr().out
    assert "parameters" in printed.splitlines()[0]
    if experiment in PUBLISHED:
        assert f"{PUBLISHED[experiment]:,} parameters" in printed
    if experiment.endswith("_pile"):
        assert "are 300 billion tokens" in printed


def test_a_mixture_can_be_planned_before_its_shards_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    call("data=mixture", "model=mamba_130m")
    assert "parameters" in capsys.readouterr().out


def test_the_sections_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    call("experiment=mamba_2.8b_pile", "--gpus", "64", "--mfu", "0.4", "--peak-tflops", "1000")
    printed = capsys.readouterr().out
    for expected in ("FLOPs per token", "AdamW moments", "activations", "checkpoints: 30.9 GiB each", "64 GPUs"):
        assert expected in printed
    # 300e9 tokens of 16.68e9 FLOPs at 0.4e15 a second.
    hours = 286_102 * 512 * 2048 * 16_681_820_160 / 0.4e15 / 3600
    assert f"{hours:,.0f} GPU-hours" in printed
    assert f"{hours / 64:.1f} hours" in printed or f"{hours / 64 / 24:.1f} days" in printed


def test_what_cannot_fit_is_refused_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    call("experiment=mamba_2.8b_pile", "engine=fsdp", "--gpus", "2")
    assert "engine.name=fsdp" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"needs \d+\.\d GiB on each of 2 devices, .* it fits with engine\.name=fsdp"):
        call("experiment=mamba_2.8b_pile", "engine=ddp", "--gpus", "2", "--gpu-memory-gib", "40")
    with pytest.raises(ValueError, match="use more GPUs"):
        call("experiment=mamba_2.8b_pile", "--gpu-memory-gib", "24")


def test_the_size_of_the_job_is_that_of_slurm_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    call("experiment=mamba_2.8b_pile", "slurm.nodes=3", "slurm.gpus_per_node=4")
    printed = capsys.readouterr().out
    assert "   12 GPUs" in printed
    assert "    8 GPUs" not in printed
    assert "training.global_batch_size=512 cannot be split over 12 GPUs" in printed
    call("experiment=mamba_2.8b_pile", "slurm.nodes=4")
    printed = capsys.readouterr().out
    assert "   32 GPUs" in printed
    assert "cannot be split" not in printed


def test_a_small_run_has_figures_that_say_something(capsys: pytest.CaptureFixture[str]) -> None:
    call("experiment=smoke")
    printed = capsys.readouterr().out
    assert re.search(r"are 10,240 tokens and \d\.\d\de\+10 FLOPs", printed)
    assert re.search(r"MFU of H100 .*: \S+ GPU-seconds\n      1 GPU +\S+ seconds\n", printed)
    assert "0.0 minutes" not in printed


def test_an_engine_for_one_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    call("experiment=mamba_130m_pile", "engine=single", "--gpus", "4")
    assert "engine.name=single trains on one GPU: choose engine=auto, ddp or fsdp for 4" in capsys.readouterr().out
    call("experiment=mamba_130m_pile", "engine=ddp", "--gpus", "4")
    assert "trains on one GPU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=mamba_9b"], "experiment=mamba_9b: there is no such option"),
        (["model.d_model=0"], "model.d_model=0: expected more than 0"),
        (["optim.lrr=3"], "optim.lrr: there is no such key"),
        (["--mfu", "40"], "--mfu 40.0: expected more than 0 and at most 1"),
        (["slurm.nodes=0"], "slurm.nodes=0: expected null or more than 0"),
        (["--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--device", "abacus"], "--device abacus: its peak is not known here; give --peak-tflops"),
        (["--gpus", "3", "engine=fsdp", "engine.replicas=2"], "engine.replicas=2: expected a divisor of the 3 GPUs"),
        (["--peak-tflops", "-1"], "--peak-tflops -1.0: expected more than 0"),
        (["--gpu-memory-gib", "0"], "--gpu-memory-gib 0.0: expected more than 0"),
        (["--gpu-memory-gib", "nan"], "--gpu-memory-gib nan: expected more than 0"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_on_the_command_line_without_data_or_tokenizer(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mamba_train", "plan", "experiment=mamba2_2.7b_pile", f"run_dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("mamba2_2.7b: 2,")
    assert not (tmp_path / "run").exists()
