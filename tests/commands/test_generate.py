"""`mamba-train generate` and `report` on a run that train.py made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_train.commands import generate
from mamba_train.data.synthetic import symbols
from mamba_train.data.tokenizer import dna_tokenizer
from tests.helpers import REPOSITORY, environment, metrics, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("commands") / "run"
    assert train(run_dir, corpus, "training.total_steps=10").returncode == 0
    return run_dir


def mamba_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mamba_train", *arguments],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_generate_continues_the_prompt_and_saves(run_dir: Path) -> None:
    arguments = ("generate", str(run_dir), "--prompt", "def naïve", "--max-new-tokens", "30")
    result = mamba_train(*arguments, "--save")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def naïve")
    assert len(result.stdout) > len("def naïve") + 10
    assert (run_dir / "sample.txt").read_text() == result.stdout
    assert "after step 10" in result.stderr
    assert mamba_train(*arguments).stdout == result.stdout
    at_home = subprocess.run(
        [sys.executable, "-m", "mamba_train", "generate", f"~/{run_dir.name}", *arguments[2:], "--save"],
        cwd=REPOSITORY,
        env=environment() | {"HOME": str(run_dir.parent)},
        capture_output=True,
        text=True,
    )
    assert at_home.stdout == result.stdout, at_home.stderr
    assert mamba_train(*arguments, "--seed", "1").stdout != result.stdout
    assert mamba_train(*arguments, "--state-precision", "bf16").returncode == 0


def test_a_prompt_that_the_tokenizer_does_not_know_is_not_left_out_silently(capsys: pytest.CaptureFixture[str]) -> None:
    task = symbols(16)
    known = task.decode([1, 2])
    assert generate._encoded(task, known) == [1, 2]
    assert generate._encoded(task, "") == []
    assert not capsys.readouterr().err
    assert generate._encoded(task, f"a{known}") == [1, 2]
    assert f"warning: --prompt 'a{known}': the tokenizer makes '{known}' of it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--prompt 'abc': the tokenizer of these weights has a token for none of"):
        generate._encoded(task, "abc")
    with pytest.raises(ValueError, match="--prompt 'acgt': the character 'a' is not in the vocabulary"):
        generate._encoded(dna_tokenizer(), "acgt")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "/no/such/run"], "/no/such/run"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["generate", "RUN", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["generate", "RUN", "--temperature", "-1"], "--temperature"),
        (["generate", "RUN", "--top-p", "0"], "--top-p"),
        (["generate", "RUN", "--top-k", "0"], "--top-k"),
        (["generate", "RUN", "--stop", ""], "--stop"),
        (["generate", "RUN", "--prompt", "a\udcff"], "--prompt"),
        (["generate", "RUN", "--stop", "\udcff"], "--stop"),
        (["generate", "RUN", "--device", "abacus"], "--device"),
    ],
)
def test_mistakes_are_one_line(run_dir: Path, arguments: list[str], expected: str) -> None:
    result = mamba_train(*(str(run_dir) if argument == "RUN" else argument for argument in arguments))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert expected in result.stderr.strip().splitlines()[-1]


def test_report_scores_the_bigram_model_on_the_validation_targets(run_dir: Path) -> None:
    result = mamba_train("report", str(run_dir))
    assert result.returncode == 0, result.stderr
    bigram = json.loads((run_dir / "baseline.json").read_text())["bigram"]
    assert 0 < bigram["nats_per_token"] < metrics(run_dir)[0]["loss"]
    assert f"{bigram['bits_per_byte']:.3f}" in result.stdout
    # The same text is behind both figures.
    last = metrics(run_dir)[-1]
    ratio = last["validation/loss"] / last["validation/bits_per_byte"]
    assert bigram["nats_per_token"] / bigram["bits_per_byte"] == pytest.approx(ratio)
    assert (run_dir / "report.png").stat().st_size > 10_000
    assert (run_dir / "report.html").stat().st_size > 10_000
