"""What the GPU tests of an operator share: what counts as right, beside fp64 and beside another implementation."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Inputs = dict[str, Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative error of a result in this dtype: for the short ones, of one rounding. More of a few values, where errors
# don't average out.
ROUNDING = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MORE_THAN_OFFICIAL = 1.1
# Beside two errors of this size, about one unit in the last place of fp32, their ratio means nothing.
FP32_UNIT = 1.2e-7
DRAWS = 32


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN: an output that no one writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def assert_accurate(
    ours: Inputs, again: Inputs, exact: Inputs, roundings: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Two runs give the same bits, and these are near the fp64 ones: no further than that many roundings.

    dtype: where also results in a longer one come from values that were rounded to it.
    """
    for name, value in ours.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"
        expected = exact[name]
        assert value.shape == expected.shape, name
        tolerance = roundings * ROUNDING[dtype or value.dtype] * (1 if value.numel() > 4096 else 2.5)
        scale = expected.norm().clamp_min(1e-6)
        error = (value.double() - expected).norm() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"
        worst = (value.double() - expected).abs().max() / torch.maximum(scale, expected.abs().max())
        assert worst < 20 * tolerance, f"{name}: an element is off by {worst:.1e} of the largest"


def assert_no_worse(draw: Callable[[], tuple[Inputs, Inputs, Inputs]]) -> None:
    """Relative errors of ours and of theirs against fp64, the mean over draws of (ours, theirs, exact).

    Of seeds from 0 on, so that a failure can be repeated; of so many, as errors of sums that cancel differ a
    hundredfold between draws.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        ours, theirs, exact = draw()
        for name in theirs:
            scale = exact[name].norm().clamp_min(1e-30)
            mine, other = (float((v.double() - exact[name]).norm() / scale) for v in (ours[name], theirs[name]))
            errors.setdefault(name, []).append((mine, other))
    worse = []
    for name, pairs in errors.items():
        our_error, their_error = (sum(found) / DRAWS for found in zip(*pairs, strict=True))
        if not our_error <= MORE_THAN_OFFICIAL * their_error + FP32_UNIT:
            seeds = ", ".join(f"{seed}: {a:.2e} {b:.2e}" for seed, (a, b) in enumerate(pairs))
            worse.append(f"{name}: relative error {our_error:.2e}, of the official one {their_error:.2e} ({seeds})")
    assert not worse, "; ".join(worse)
