"""The self-test that `mamba-train doctor` prints, on a GPU."""

import pytest
import torch

from mamba_train.monitor.self_test import SCAN_SHAPES, run_self_tests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_is_right_and_the_fast_ones_run(dtype: torch.dtype) -> None:
    found = {test.operator: test for test in run_self_tests(torch.device("cuda", 0), dtype)}
    for test in found.values():
        print(f"{test.operator:<24} {test.kernel:<40} {test.error:.1e} ({test.worst})")
    assert all(test.passed for test in found.values())
    for operator in ("selective_scan", *SCAN_SHAPES):
        assert found[operator].kernel == "CUDA C++"
    for operator in ("ssd", "linear_cross_entropy", "causal_conv1d_step", "selective_scan_step"):
        assert found[operator].kernel == "Triton"
