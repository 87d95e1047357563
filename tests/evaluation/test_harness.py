"""The harness through our adapter and through the exported transformers model: the same scores, offline."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_train.checkpoint.storage import Checkpoint, save
from mamba_train.config import ModelConfig
from mamba_train.convert.export import export
from mamba_train.convert.names import Layout
from mamba_train.data.tokenizer import TextTokenizer, train_tokenizer
from mamba_train.inference.sampling import Sampling
from mamba_train.model.language_model import resolve_model_config
from tests.convert import models
from tests.convert.conftest import perturbed
from tests.helpers import REPOSITORY, environment

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

# Each fourth text takes several of the windows that the model is given, and one continuation has nothing before it. No
# two windows are alike: the adapter of transformers takes such for one, also where other parts of them count.
QUESTIONS = [
    {
        "text": text,
        "context": text if i else "",
        "choices": [f" pieces {i}", " more", " from and text"],
        "answer": i % 3,
    }
    for i in range(12)
    for text in [" ".join(f"some text {i + 12 * j} to learn" for j in range(24 if i % 4 == 3 else 1))]
]
DATASET = {"dataset_path": "json", "test_split": "test"}
CHOOSE = {
    "task": "choose",
    **DATASET,
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLL = {
    "task": "roll",
    **DATASET,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}
WRITE = {
    "task": "write",
    **DATASET,
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": " more",
    "generation_kwargs": {"until": ["m"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")


def make_run(tmp_path: Path, config: ModelConfig) -> Path:
    """A run whose model has no more tokens than its tokenizer: transformers would choose from those, too."""
    tokenizer = train_tokenizer(["some text to learn pieces from, and some more text"], 300)
    config = resolve_model_config(dataclasses.replace(config, pad_vocab_size_multiple=1), tokenizer.vocab_size)
    save(
        tmp_path / "run" / "checkpoints", Checkpoint(7, perturbed(config), config=models.as_dict(config)), reserve_gib=0
    )
    (tmp_path / "run" / "tokenizer.json").write_bytes(tokenizer.serialised)
    return tmp_path / "run"


def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    data = {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}
    return [{**task, "dataset_kwargs": data} for task in (CHOOSE, ROLL, WRITE)]


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model said to each request, which is more than the scores."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


@pytest.mark.parametrize(
    "config",
    [models.MAMBA1, pytest.param(models.MAMBA2_GROUPED, marks=pytest.mark.slow)],
    ids=["mamba1", "mamba2"],
)
def test_our_adapter_and_the_export_answer_alike(tmp_path: Path, config: ModelConfig) -> None:
    import lm_eval

    from mamba_train.evaluation.results import task_scores

    run_dir = make_run(tmp_path, config)
    export(run_dir, tmp_path / "exported", Layout.transformers, lambda line: None)
    import mamba_train.evaluation.harness  # noqa: F401

    options = {"tasks": tasks(tmp_path), "bootstrap_iters": 0, "batch_size": 4, "device": "cpu"}
    ours = lm_eval.simple_evaluate("mamba_train", model_args={"checkpoint": str(run_dir), "max_length": 32}, **options)
    theirs = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(tmp_path / "exported"), "max_length": 32, "dtype": "float32"}, **options
    )
    assert task_scores(ours) == pytest.approx(task_scores(theirs), rel=1e-4)
    assert {"choose/acc", "roll/bits_per_byte", "write/exact_match"} <= set(task_scores(ours))
    mine, judge = answers(ours), answers(theirs)
    assert float(mine["roll"][3][0][0]) == pytest.approx(float(judge["roll"][3][0][0]), rel=2e-6)
    for request, expected in zip(mine["choose"], judge["choose"], strict=True):
        for (value, greedy), (right, right_greedy) in zip(
            (pair for responses in request for pair in responses), (p for r in expected for p in r), strict=True
        ):
            assert float(value) == pytest.approx(float(right), rel=1e-4)
            assert greedy == right_greedy
    assert mine["write"] == judge["write"]
    assert len({str(response) for response in mine["write"]}) > 1, "the same answer to everything proves nothing"


@pytest.mark.parametrize(("top_k", "expected"), [(0, None), (5, 5)])
def test_settings_of_a_task_that_draws(top_k: int, expected: int | None) -> None:
    from lm_eval.api.instance import Instance

    from mamba_train.evaluation.harness import HarnessModel

    def generate(prompts: Any, sampling: Sampling, **options: Any) -> list[str]:
        return [repr(sampling)] * len(prompts)

    tokenizer = TextTokenizer(train_tokenizer(["some text to learn pieces from"], 300).serialised, "here")
    settings = {"until": ["m"], "do_sample": True, "temperature": 0.5, "top_k": top_k, "top_p": 0.9}
    model = HarnessModel(tokenizer, lambda tokens: tokens, generate)
    (found,) = model.generate_until([Instance("generate_until", {}, ("some text", settings), 0)])
    assert found == repr(Sampling(0.5, expected, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "--model_args checkpoint is missing"),
        ({"chekpoint": "x"}, "--model_args chekpoint: there is no such argum"),
    ],
)
def test_arguments_that_are_missing_or_unknown_are_one_line(arguments: dict[str, str], message: str) -> None:
    from mamba_train.evaluation.harness import PretrainedModel

    with pytest.raises(ValueError, match=message):
        PretrainedModel(**arguments, batch_size=1)  # type: ignore[arg-type]


def test_the_command_line_of_the_harness_knows_our_model(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, models.MAMBA2)
    task, *_ = tasks(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choose.yaml").write_text(json.dumps(task))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mamba_train", "lm-eval", "run", "--model", "mamba_train"),
            *("--model_args", f"checkpoint={run_dir}", "--tasks", "choose", "--include_path", str(tmp_path / "tasks")),
            *("--output_path", str(tmp_path / "out"), "--device", "cpu"),
        ],
        cwd=REPOSITORY,
        env=environment() | {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "|choose|" in result.stdout
    assert "mamba_train" in result.stdout
