import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def memory_folder(tmp_path):
    """A folder in memory if there is one: a killed process, unlike a power cut, loses nothing by it."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared_memory) as place:
        yield Path(place)


@pytest.mark.parametrize(
    ("scenario", "least_kills"), [("new_step", 20), ("same_step", 25), ("retention", 15), ("random_instants", 40)]
)
def test_kill_minus_nine(memory_folder, scenario, least_kills):
    worker = Path(__file__).with_name("kill_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), scenario, str(memory_folder / "checkpoints")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= least_kills, done.stdout
