"""Where parts of parameters lie, as far as no DeepSpeed is needed; tests/distributed has the engine."""

import math
from typing import Any

import pytest
import torch

from mamba_train.parallel.zero import ZeroEngine


@pytest.mark.parametrize("n_elements", [1, 4, 5, 6, 9])
def test_parts_of_stage_3_are_the_parameter_without_what_fills_them_up(n_elements: int) -> None:
    """Each rank has as many elements, of which some, or all, may be behind the end."""
    engine = ZeroEngine.__new__(ZeroEngine)
    found = []
    for engine.rank in range(4):
        parameter: Any = torch.empty(0)
        parameter.ds_shape, parameter.ds_tensor = (n_elements,), torch.zeros(math.ceil(n_elements / 4))
        piece = engine._stage_3_piece(parameter)
        found += range(piece.start, piece.start + piece.values.numel())
    assert found == list(range(n_elements))
