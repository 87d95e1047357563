"""Tests that need much GPU memory run alone (`make test-gpu`), and only where there is as much."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _large_memory(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("large_memory")
    if marker is None:
        return
    gc.collect()
    torch.cuda.empty_cache()
    (needed,), (free, total) = marker.args, (number / 2**30 for number in torch.cuda.mem_get_info())
    if total < needed:
        pytest.skip(f"needs {needed} GiB of GPU memory, this GPU has {total:.0f}")
    if free < needed:
        pytest.fail(
            f"needs {needed} GiB of GPU memory, {free:.0f} of {total:.0f} are free: run it alone, as `make test-gpu`"
        )
