"""The convolution's Triton kernels, without a GPU."""

import math
from pathlib import Path

import pytest

from kernels.causal_conv1d import launch
from tests.kernels.triton_interpreter import run_interpreted


def test_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


SHAPES = [
    *((8, 2048, 5120), (1, 131072, 5376), (3, 4063, 4200), (64, 100, 5120), (1, 7, 8)),
    *((1, 501, 4800), (8, 1256, 288), (2, 1892, 1072), (2, 601, 2992)),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("with_more", "at_once"), [(False, 16), (True, 5)])
def test_rounds_of_programs_are_full(with_more: bool, at_once: int, shape: tuple[int, int, int]) -> None:
    """None has a last round for a few programs, which would take as long as the others."""
    batch, length, channels = shape
    places = 132 * at_once
    launched = launch.backward_shape(*shape, processors=132, with_more=with_more)
    assert launched.steps % launched.unroll == 0
    sequences = batch * math.ceil(channels / launched.block)
    programs = sequences * math.ceil(length / (launched.steps - launch.MAX_WIDTH + 1))
    rounds = programs / places
    assert rounds <= 1 or sequences >= places or rounds > 0.9 * math.ceil(rounds)


def test_few_programs_have_one_round_of_loads() -> None:
    """Of a plain call: what else there may be would have them compiled for longer."""
    small = launch.backward_shape(1, 501, 4800, processors=132, plain=True)
    assert small.stretches > 1
    assert small.unroll == small.steps
    for shape, plain in (((1, 501, 4800), False), ((8, 2048, 1536), True), ((1, 3900, 1504), True)):
        assert launch.backward_shape(*shape, processors=132, plain=plain).stretches == 1
