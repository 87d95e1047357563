"""Tasks of the harness and samples of text while a run is trained, without a trace in its steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_train.checkpoint import rng
from mamba_train.composition import compose_config
from mamba_train.config import EvaluationConfig
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.harness import HarnessHook, task_manager
from tests.helpers import TINY_RUN, curve, metrics, train

pytest.importorskip("lm_eval")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = tmp_path / "questions.jsonl"
    lines = [{"text": f"def f{i}", "choices": [" (x):", " zzqx", "..."], "answer": 0} for i in range(6)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choose.yaml").write_text(json.dumps(task))
    return tmp_path / "tasks"


@pytest.mark.slow
def test_tasks_and_samples_leave_the_steps_as_they_are(tmp_path: Path, corpus: Path, tasks: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert train(plain, corpus, "training.total_steps=10").returncode == 0
    options = [
        *("evaluation.tasks=[choose]", f"evaluation.task_folder={tasks}", "evaluation.interval_steps=5"),
        *("evaluation.sample_tokens=12", "evaluation.sample_prompts=['','def ']"),
    ]
    result = train(watched, corpus, "training.total_steps=10", *options)
    assert result.returncode == 0, result.stderr
    assert curve(watched) == curve(plain), "bit by bit"
    recorded = [record for record in metrics(watched) if "evaluation/choose/acc" in record]
    assert [record["step"] for record in recorded] == [5, 10]
    assert json.loads((watched / "evaluation" / "harness-step_00000010.json").read_text())["scores"] == {
        "choose/acc": recorded[-1]["evaluation/choose/acc"]
    }
    texts = [(watched / "samples" / f"step_{step:08d}.txt").read_text() for step in (5, 10)]
    assert texts[0] != texts[1]
    assert "\n\ndef " in texts[1]


def test_the_generators_of_the_run_are_put_back(
    tmp_path: Path, corpus: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    on_step = HarnessHook.on_step

    def watched(self: HarnessHook, trainer: Any, measured: dict[str, Any]) -> None:
        states.append(rng.capture())
        on_step(self, trainer, measured)
        states.append(rng.capture())

    monkeypatch.setattr(HarnessHook, "on_step", watched)
    config = compose_config(
        [
            *("data=local", f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", *TINY_RUN),
            *(f"run_dir={tmp_path / 'run'}", "training.total_steps=1", "schedule.warmup_steps=0"),
            *("evaluation.tasks=[choose]", f"evaluation.task_folder={tasks}"),
        ]
    )
    build_trainer(config).run()
    assert len(states) == 2
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_task_that_does_not_exist_is_said_at_the_start(tmp_path: Path, corpus: Path) -> None:
    result = train(tmp_path / "run", corpus, "evaluation.tasks=[no_such_task]")
    assert result.returncode == 2
    assert "evaluation.tasks" in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    result = train(tmp_path / "run", corpus, "evaluation.interval_steps=5")
    assert result.returncode == 2
    assert "evaluation.interval_steps=5" in result.stderr.strip().splitlines()[-1]


def test_tasks_that_could_not_be_run_are_said_before_the_first_step(tasks: Path) -> None:
    definition = json.loads((tasks / "choose.yaml").read_text())
    writes = {**definition, "task": "writes", "output_type": "generate_until", "doc_to_target": " more"}
    absent = {**definition, "task": "absent", "dataset_kwargs": {"data_files": {"test": str(tasks / "no_such.jsonl")}}}
    for changed in (writes, absent):
        (tasks / f"{changed['task']}.yaml").write_text(json.dumps(changed))
    for name, expected in (
        ("writes", "writes has the model write text"),
        ("absent", "no_such.jsonl"),
        ("unknown", "no task unknown"),
    ):
        with pytest.raises(ValueError, match=f"evaluation.tasks: .*{expected}"):
            task_manager(EvaluationConfig(tasks=[name], task_folder=str(tasks)))
    task_manager(EvaluationConfig(tasks=["choose"], task_folder=str(tasks)))


def test_a_full_disk_costs_the_sample_and_not_the_training(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_text = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.parent.name == "samples":
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    config = compose_config(
        [
            *("data=local", f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", *TINY_RUN),
            *(f"run_dir={tmp_path / 'run'}", "training.total_steps=1", "schedule.warmup_steps=0"),
            "evaluation.sample_tokens=2",
        ]
    )
    build_trainer(config).run()
    assert "No space left on device; training goes on" in "".join(capfd.readouterr())
    assert not list((tmp_path / "run" / "samples").glob("*"))
