"""Which kernel runs for which shape, and into how many segments its time is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.selective_scan.cuda import variants

PROCESSORS = 132
PLANS = [variants.forward_plan, variants.backward_plan]


@given(st.integers(1, 256), st.integers(1, 64), st.integers(1, 2**18), st.integers(1, 8192))
def test_segments_fit_on_the_gpu_and_are_worth_their_beginning(
    states: int, batch: int, length: int, channels: int
) -> None:
    for plan in PLANS:
        variant, count = plan(states, batch, length, channels, PROCESSORS)
        assert 1 <= count <= variants.MOST_SEGMENTS
        if count > 1:
            places = PROCESSORS * variant.min_blocks
            assert batch * variant.groups(channels) * 2 <= places
            assert length > count * (variants.LEAST_TILES - 1) * variant.tile


@pytest.mark.parametrize("plan", PLANS)
def test_shapes_of_an_h100(plan) -> None:
    for batch, length, channels in [(8, 2048, 5120), (4, 8192, 5120), (32, 2048, 1536)]:
        assert plan(16, batch, length, channels, PROCESSORS)[1] == 1, "there are channels enough"
    for batch, length, channels in [(1, 2048, 5120), (1, 32768, 5120), (1, 131072, 2048), (2, 4096, 1536)]:
        variant, count = plan(16, batch, length, channels, PROCESSORS)
        places = PROCESSORS * variant.min_blocks
        assert 0.75 * places < batch * variant.groups(channels) * count
    assert plan(16, 1, 16, 64, PROCESSORS)[1] == 1


@pytest.mark.parametrize(
    ("batch", "channels", "rings"),
    [(1, 1536, 1), (1, 2048, 1), (1, 5120, 2), (2, 2048, 2), (4, 2048, 0), (1, 1024, 0), (8, 5120, 0)],
)
def test_forwards_whose_warps_take_turns(batch: int, channels: int, rings: int) -> None:
    variant, count = variants.forward_plan(16, batch, 2048, channels, PROCESSORS)
    assert (variant.source == "chained") == (rings > 0)
    if rings:
        assert (variant.rings, count) == (rings, 1)
        assert variant.warps // rings >= 2, "a warp hands its state over to another"
