"""The Triton kernels without a GPU: computed by Triton's interpreter, which a process has on or off from its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux on x86-64)")
FILES = ["causal_conv1d/interpreted.py", "rms_norm/interpreted.py"]


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    # A process of its own, not a worker of the test run: that variable would make its conftest think so.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
