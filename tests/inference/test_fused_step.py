"""The step in few kernels is the step of the model. On a GPU: tests/gpu/test_generation.py."""

from pathlib import Path

from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))
