"""Runs test modules whose Triton kernels are interpreted on the CPU, where NumPy executes what a GPU would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(module: Path, timeout_seconds: int = 300) -> None:
    """Run the tests of a file that pytest does not collect by itself, in a process of its own.

    Triton decides at its import whether its kernels are compiled or interpreted, for the whole process.
    """
    pytest.importorskip("triton", reason="needs triton for its interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(module)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def drop_nan_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter's min and max return the other number for NaN, where NumPy's keep it."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))
