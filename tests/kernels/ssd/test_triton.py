"""SSD's Triton kernels, without a GPU."""

from pathlib import Path

from tests.kernels.triton_interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))
