"""Launch shapes of the norms."""

import pytest

from kernels.rms_norm import launch, shapes


@pytest.mark.parametrize(("gated", "plain"), [(False, False), (False, True), (True, False)])
def test_forward_shapes(gated: bool, plain: bool) -> None:
    """A row fits, powers of two, and channels of a thread that fit its registers."""
    for size in (*range(1, 2100), *range(2101, launch.MAX_SIZE + 1, 37), launch.MAX_SIZE):
        rows, block, warps = shapes.forward_shape(size, gated, plain)
        assert all(number & (number - 1) == 0 for number in (rows, block, warps))
        channels = rows * -(-size // block) * block / (32 * warps)
        assert channels <= (32 if size <= 8192 else 64), size
        assert warps <= 32


def test_programs_ask_ahead_for_what_the_cache_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cache_bytes", lambda device: 1000)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    assert launch._asking(0, 1000, shapes.Shape(1, 1024, 8)) == 0
    assert launch._asking(0, 1001, shapes.Shape(1, 1024, 8)) == 132 * 8
    assert launch._asking(0, 1001, shapes.Shape(1, 256, 1)) == 132 * 32
