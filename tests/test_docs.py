"""The pages must keep up with the code they describe."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from mamba_train.checkpoint import resume_policy
from mamba_train.composition import compose_config, known_keys
from slurm.submit import compose_submission
from tests.helpers import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in the code blocks; not those with `...`, which are not whole."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            if re.match(r" *(python|torchrun|srun|mamba-train) ", line) and "..." not in line:
                found.append((page.name, shlex.split(line, comments=True)))
    return found


COMMANDS = commands()


def overrides_of(words: list[str]) -> list[str] | None:
    """The config that a command composes; None where it composes none."""
    if "train.py" in words and not {"--help", "--cfg", "-m"} & set(words):
        return words[words.index("train.py") + 1 :]
    if {"plan", "doctor"} & set(words):
        return [word for word in words if re.match(r"\+?[a-z][\w.]*=", word)]
    return None


COMPOSED = [(page, words) for page, words in COMMANDS if overrides_of(words) is not None]
SUBMITTED = [(page, words) for page, words in COMMANDS if "slurm.submit" in words]


def test_there_are_commands() -> None:
    assert len(COMPOSED) > 25
    assert len(SUBMITTED) > 2


@pytest.mark.parametrize(("page", "words"), COMPOSED, ids=lambda value: None if isinstance(value, str) else value[-1])
def test_the_config_of_a_command_can_be_composed(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--nproc-per-node" in words:
        started = {"WORLD_SIZE": words[words.index("--nproc-per-node") + 1], "RANK": "0", "LOCAL_RANK": "0"}
        for name, value in (started | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
            monkeypatch.setenv(name, value)
    overrides = overrides_of(words)
    assert overrides is not None
    if page == "README.md" and overrides == ["model.d_modl=256"]:
        return  # shown for its error
    compose_config(overrides, may_be_missing=("data.path", "data.tokenizer", "data.sources", "init_from"))


@pytest.mark.parametrize(("page", "words"), SUBMITTED, ids=lambda value: None if isinstance(value, str) else value[-1])
def test_a_command_that_submits_is_not_refused(page: str, words: list[str], tmp_path: Path) -> None:
    overrides = words[words.index("slurm.submit") + 1 :]
    here = [f"data.path={tmp_path}" if word.startswith("data.path=") else word for word in overrides]
    assert compose_submission([word for word in here if not word.startswith("--")], tmp_path).runs


def test_every_key_is_on_the_configuration_page(repository: Path) -> None:
    page = (repository / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = known_keys()
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys) and key != "experiment"]
    missing = [key for key in leaves if f"`{key}`" not in page]
    assert not missing
    named = set(re.findall(r"`((?:model|data|optim|schedule|engine|logging|checkpoint|training)\.\w+)`", page))
    assert named <= set(keys), f"on the page but not in the schema: {sorted(named - set(keys))}"


def test_the_resume_table_on_the_page_is_the_one_in_the_code(repository: Path) -> None:
    page = (repository / "docs" / "configuration.md").read_text(encoding="utf-8")
    for pattern, action, reason in resume_policy.table():
        assert f"| `{pattern}` | {action} | {reason} |" in page


def test_every_direct_dependency_has_its_line(repository: Path) -> None:
    page = (repository / "docs" / "dependencies.md").read_text(encoding="utf-8")
    project = (repository / "pyproject.toml").read_text(encoding="utf-8")
    names = re.findall(r'^\s+"([A-Za-z0-9-]+)>=', project, re.MULTILINE)
    names += re.findall(r'deepspeed = \["([a-z]+)>=', project)
    assert len(names) > 15
    missing = [name for name in names if not re.search(rf"^\|[^|]*\b{re.escape(name)}\b", page, re.MULTILINE)]
    assert not missing
    pinned = (repository / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    assert [name for name in names if f"\n{name}==" not in pinned] == []


def test_the_example_of_the_loading_page_is_what_python_says(repository: Path) -> None:
    result = doctest.testfile(str(repository / "docs" / "loading.md"), module_relative=False)
    assert result.attempted > 10
    assert not result.failed
