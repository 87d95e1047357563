"""What a value of the wrong kind is told, without a process for each."""

import re
from pathlib import Path

import pytest

from mamba_train.composition import compose_config


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("engine.reshard_after_forward", "maybe", "true or false, or null"),
        ("model.dt_rank", "wide", "a whole number, or null"),
        ("watchdog.data_seconds", "long", "a number, or null"),
        ("data.task", "copying", "one of induction_heads, selective_copying, mqar, or null"),
        ("data.path", "[1, 2]", "text, or null"),
        ("engine.compile", "maybe", "true or false"),
        ("training.total_steps", "1.5", "a whole number"),
        ("schedule.kind", "flat", "one of constant, cosine, wsd"),
        ("seed", "x", "a whole number"),
    ],
)
def test_null_is_offered_where_it_is_taken_and_nowhere_else(key: str, value: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{key}={value}: expected {expected}')}$"):
        compose_config([f"{key}={value}"])
    if expected.endswith("or null"):
        compose_config([f"{key}=null"])
    else:
        with pytest.raises(ValueError, match="null: a value is needed here"):
            compose_config([f"{key}=null"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run_dir=[1, 2]", "run_dir=[1, 2]: expected text"),
        ("evaluation.tasks=lambada", "evaluation.tasks=lambada: expected a list such as [A,B]; an empty one is []"),
        ("logging.profile_steps=[5,x]", "logging.profile_steps[1]=x: expected a whole number"),
        ("logging.profile_steps=[5,0]", "logging.profile_steps=[5, 0]: expected steps, which are counted from 1"),
        ("data.name=../b", "data.name='../b': expected a name without /: folders are called by it"),
        ("model.name=", "model.name='': expected a name without /: folders are called by it"),
        ("data.sources=a", "data.sources: names are added one by one, as +data.sources.NAME=VALUE; see --help"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        compose_config([override])


def test_a_tilde_is_the_home_folder_where_no_shell_has_read_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    mounts = "slurm.container_mounts=['~/a','/b:/c']"
    config = compose_config(
        ["run_dir='~/run'", "evaluation.task_folder='~/tasks'", "slurm.python='~/bin/python'", mounts]
    )
    assert (config.run_dir, config.evaluation.task_folder) == (f"{tmp_path}/run", f"{tmp_path}/tasks")
    assert config.slurm.python == f"{tmp_path}/bin/python"
    assert config.slurm.container_mounts == [f"{tmp_path}/a", "/b:/c"]


@pytest.mark.parametrize(
    ("key", "value", "largest"),
    [
        ("model.n_layer", 10**6, "10,000"),
        ("model.d_model", 10**8, "1,000,000"),
        ("model.vocab_size", 10**20, "2,147,483,647"),
        ("training.total_steps", 10**20, "9,223,372,036,854,775,807"),
        ("data.sequence_length", 10**10, "2,147,483,647"),
    ],
)
def test_a_number_with_digits_too_many(key: str, value: int, largest: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{key}={value}: expected at most {largest}')}$"):
        compose_config([f"{key}={value}"])
