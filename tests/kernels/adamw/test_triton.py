"""The update's kernel on the CPU, by Triton's interpreter."""

from pathlib import Path

from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))
