import contextlib
import os
from pathlib import Path

import pytest

from tests.distributed.launch import SharedRuns
from tests.helpers import write_corpus


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    place = base if base.name.startswith("pytest-") else base.parent  # under xdist each process has a folder in it
    folder = place / "distributed"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def texts(common: Path) -> Path:
    """The corpus of all runs here: one, so that they can share what is prepared from it."""
    folder = common / "corpus"
    if not folder.exists():
        # By a rename: another test process may be doing the same.
        made = write_corpus(common / f"corpus.{os.getpid()}")
        with contextlib.suppress(OSError):
            made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def runs(common: Path, texts: Path) -> SharedRuns:
    return SharedRuns(common, texts)
