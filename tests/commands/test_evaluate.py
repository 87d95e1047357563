"""`mamba-train evaluate` on a run that train.py made."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mamba_train.commands import evaluate
from mamba_train.evaluation import perplexity
from mamba_train.evaluation.perplexity import losses_of
from tests.commands.test_generate import mamba_train
from tests.helpers import metrics, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    # All windows there are, as the command reads them.
    assert train(run_dir, corpus, "training.total_steps=10", "training.validation_sequences=100000").returncode == 0
    return run_dir


def test_packed_is_what_validation_during_training_said(run_dir: Path) -> None:
    result = mamba_train("evaluate", str(run_dir))
    assert result.returncode == 0, result.stderr
    found = json.loads((run_dir / "evaluation" / "perplexity-packed-step_00000010.json").read_text())
    last = metrics(run_dir)[-1]
    # Training leaves the last window out where it is not whole.
    assert found["all"]["nats_per_token"] == pytest.approx(last["validation/loss"], rel=5e-3)
    assert found["all"]["bits_per_byte"] == pytest.approx(last["validation/bits_per_byte"], rel=5e-3)
    assert (found["protocol"], found["length"], found["step"]) == ("packed", 32, 10)
    assert f"{found['all']['bits_per_byte']:.4f} bits per byte" in result.stdout


def test_more_context_per_token_and_other_lengths(run_dir: Path, tmp_path: Path) -> None:
    sliding = mamba_train("evaluate", str(run_dir), "--protocol", "sliding", "--stride", "8", "--max-tokens", "2000")
    assert sliding.returncode == 0, sliding.stderr
    assert "protocol sliding, length 32, stride 8" in sliding.stdout
    lengths = mamba_train("evaluate", str(run_dir), "--lengths", "32,128", "--output", str(tmp_path))
    assert lengths.returncode == 0, lengths.stderr
    found = json.loads((tmp_path / "evaluation" / "lengths-32_128-step_00000010.json").read_text())
    assert set(found["lengths"]) == {"32", "128"}
    assert found["trained_length"] == 32
    assert (tmp_path / "evaluation" / "lengths-32_128-step_00000010.png").stat().st_size > 10_000


def test_another_question_does_not_replace_the_answer(run_dir: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    data = json.loads((run_dir / "summary.json").read_text())["data_folder"]
    common = [str(run_dir), "--max-tokens", "64", "--output", str(tmp_path)]
    asked: list[list[str]] = [[], ["--length", "16"], ["--split", "train"], ["--data", data], ["--precision", "bf16"]]
    many = ",".join(str(length) for length in range(1, 64))  # a name with all of them would be too long for a file
    asked += [["--lengths", "16,32"], ["--lengths", "16"], ["--lengths", many], ["--lengths", many + ",64"]]
    for arguments in [*asked, [], ["--precision", "fp32"]]:
        evaluate.run(parser.parse_args([*common, *arguments]))
    evaluate.run(parser.parse_args([*common, "--lengths", "32,16,32"]))  # asked before, in other words
    found = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")]
    assert len(found) == len(asked)
    assert sorted(result["split"] for result in found) == ["train", *["validation"] * 8]
    assert [result["precision"] for result in found].count("bf16") == 1
    # A GPU's default is another precision than the CPU's, so another answer.
    on_gpu = parser.parse_args([*common, "--device", "cuda"])
    assert evaluate._asked_for(on_gpu, {}) == "-max_tokens_64-precision_bf16"
    assert [result["data"] for result in found].count([data]) == 1


def test_windows_at_once_are_as_many_as_asked_for(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with --lengths, where a GPU may have no room for what it takes by itself."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    rows: set[int] = set()

    def watched(model: Any) -> Any:
        def losses(tokens: Any, *rest: Any) -> Any:
            rows.add(len(tokens))
            return losses_of(model)(tokens, *rest)

        return losses

    monkeypatch.setattr(perplexity, "losses_of", watched)
    common = [str(run_dir), "--max-tokens", "384", "--output", str(tmp_path)]
    for arguments, expected in (([], {8, 4}), (["--lengths", "32,64"], {12, 6})):
        for more, at_once in (([], expected), (["--batch-size", "3"], {3})):
            rows.clear()
            evaluate.run(parser.parse_args([*common, *arguments, *more]))
            assert rows == at_once
    with pytest.raises(ValueError, match="--split test: there is no text in it, but in train and validation"):
        evaluate.run(parser.parse_args([str(run_dir), "--split", "test"]))


def test_a_run_whose_data_are_gone_asks_for_others(run_dir: Path, tmp_path: Path) -> None:
    """Its cache was removed, or the weights were imported: nobody gave a --data that could be wrong."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "data_folder": str(tmp_path / "gone")}))
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with pytest.raises(ValueError, match=r"run: its data are not in .*/gone; name some by --data FOLDER"):
        evaluate.run(parser.parse_args([str(copy)]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/no/such/run"], "/no/such/run"),
        (["RUN", "--length", "0"], "--length 0"),
        (["RUN", "--stride", "8"], "--protocol sliding"),
        (["RUN", "--protocol", "sliding", "--stride", "64"], "stride 64"),
        (["RUN", "--lengths", "32,x"], "--lengths 32,x"),
        (["RUN", "--data", "/no/such/data"], "/no/such/data"),
        (["RUN", "--data", "/no/such/data", "--data", "/nor/such"], "--data NAME=FOLDER"),
        (["RUN", "--split", "test"], "--split test"),
        (["RUN", "--output", __file__], "--output DIR"),
    ],
)
def test_mistakes_are_one_line(run_dir: Path, arguments: list[str], expected: str) -> None:
    result = mamba_train("evaluate", *(str(run_dir) if argument == "RUN" else argument for argument in arguments))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert expected in result.stderr.strip().splitlines()[-1]
