"""The floors of the house: a module imports only from floors below its own (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# From the ground up; modules of one floor do not import each other.
FLOORS: list[set[str]] = [
    {"mamba_train._kernels_name", "mamba_train.config_data"},
    {"kernels", "mamba_train.config", "mamba_train.ranks", "mamba_train.run_folder"},
    {"mamba_train.config_data_checks"},
    {"mamba_train.model", "mamba_train.data", "mamba_train.config_checks"},
    {"mamba_train.checkpoint", "mamba_train.composition"},
    {
        "mamba_train.parallel",
        "mamba_train.convert",
        "mamba_train.inference",
        "mamba_train.monitor",
    },
    {"mamba_train.evaluation"},
    {"mamba_train.training"},
    {"mamba_train.commands", "data_prep", "slurm", "mamba_train.__main__", "train"},
]


def room_of(module: str) -> tuple[int, str] | None:
    """(floor, room) of a dotted module name; None for what is not ours."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return floor, room
    return None


def imported_modules(source: str) -> list[str]:
    """Dotted names that a source imports, at its top or inside functions; type-only imports are left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from mamba_train.checkpoint import rng` imports a module or a name: both are in that room.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that go against the floors."""
    here = room_of(module)
    if here is None:
        return [f"{module} is in no room of the house: add it to FLOORS"]
    found = []
    for imported in imported_modules(source):
        there = room_of(imported)
        is_ours = imported.split(".")[0] in ("mamba_train", "kernels", "data_prep", "slurm", "train")
        if there is None and is_ours and imported not in ("mamba_train", "mamba_train._kernels_name"):
            found.append(f"{module} imports {imported}, which is in no room")
        elif there is not None and there[1] != here[1] and there[0] >= here[0]:
            found.append(f"{module} (floor {here[0]}) imports {imported} (floor {there[0]})")
    return found


def our_modules(repository: Path) -> list[tuple[str, str]]:
    """(dotted name, source) of every module of the house."""
    paths = [repository / "train.py"]
    for folder in ("kernels", "mamba_train", "data_prep", "slurm"):
        paths += sorted((repository / folder).rglob("*.py"))
    named = []
    for path in paths:
        parts = list(path.relative_to(repository).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        named.append((".".join(parts), path.read_text(encoding="utf-8")))
    return named


def test_no_import_goes_against_the_floors(repository: Path) -> None:
    found = []
    for module, source in our_modules(repository):
        if module != "mamba_train":  # the package itself only claims the name `kernels`
            found += violations(module, source)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.selective_scan", "from mamba_train.model.block import Block"),
        ("mamba_train.model.block", "import mamba_train.training.trainer"),
        ("mamba_train.data.batches", "def f():\n    from mamba_train.model import block"),
        ("mamba_train.parallel.native", "from mamba_train.monitor import flops"),
        ("mamba_train.checkpoint.storage", "from train import run"),
        ("mamba_train.somewhere", "import math"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mamba_train.training.trainer", "from mamba_train.parallel.engine import Engine"),
        ("mamba_train.model.block", "from mamba_train.model.observe import observe_scans"),
        (
            "mamba_train.model.block",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mamba_train.training import trainer",
        ),
    ],
)
def test_a_right_import_is_not_reported(module: str, source: str) -> None:
    assert not violations(module, source)


@pytest.mark.parametrize(
    "module",
    ["mamba_train", "mamba_train.composition", "mamba_train.config_checks", "mamba_train.data.prepare", "train"],
)
def test_the_config_is_read_without_torch(module: str, repository: Path) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=repository).returncode == 0
