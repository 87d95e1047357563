"""What the self-test reaches on a GPU, asked of the tables that choose the kernels; tests/gpu runs it there."""

import pytest
import torch

from kernels.selective_scan.cuda import variants
from mamba_train.monitor.self_test import BATCH, CHANNELS, LENGTH, ON_GPUS, SCAN_SHAPES, STATES


@pytest.mark.parametrize("processors", [108, 114, 132, 142])  # of A100, H100 (PCIe), H100 and H200, L40S
def test_every_way_of_the_scan_is_among_the_shapes(processors: int) -> None:
    def ways(batch: int, length: int, channels: int) -> tuple[str, bool, bool]:
        forward, side_by_side = variants.forward_plan(STATES, batch, length, channels, processors)
        _, backward = variants.backward_plan(STATES, batch, length, channels, processors)
        return forward.source, side_by_side > 1, backward > 1

    assert ways(BATCH, LENGTH, CHANNELS) == ("forward", False, False)
    assert ways(*SCAN_SHAPES["selective_scan, chained"]) == ("chained", False, True)
    assert ways(*SCAN_SHAPES["selective_scan, segments"]) == ("forward", True, True)


def test_the_inputs_have_these_shapes() -> None:
    for name, shape in SCAN_SHAPES.items():
        make, _ = ON_GPUS[name]
        assert make(torch.Generator())["x"].shape == shape
