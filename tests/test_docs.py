"""The pages must keep up with the code they describe."""

import doctest
import re
from pathlib import Path

from mamba_train.checkpoint import resume_policy
from mamba_train.composition import known_keys


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
