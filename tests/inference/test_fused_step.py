"""The step in few kernels is the step of the model. On a GPU: tests/gpu/test_generation.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import decode
from mamba_train.inference.fused_step import can_fuse
from mamba_train.model.language_model import MambaLM
from tests.kernels.triton_interpreter import run_interpreted
from tests.model.families import FAMILIES, small_config


def fuses(family: str, batch_size: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
    with torch.device("meta"):
        return can_fuse(MambaLM(small_config(family, **changes)).to(dtype), batch_size)


def test_which_models_take_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fuses("mamba1", 1), "no CUDA device"
    monkeypatch.setattr(decode, "supports", lambda weight: True)
    for batch in (1, 2):
        for family in FAMILIES:
            assert fuses(family, batch) == (family not in ("hybrid", "transformer")), (family, batch)
        assert fuses("mamba1", batch, torch.float32)
        assert not fuses("mamba1", batch, time_invariant=True)
        assert not fuses("mamba1", batch, d_conv=1)
        # A row is kept in at most 8 pieces of a power of two.
        assert not fuses("mamba1", batch, d_model=44)
        assert not fuses("mamba1", batch, expand=3)
        assert not fuses("mamba1_mlp", batch, d_intermediate=44)
        assert fuses("mamba2", batch, d_model=48, head_dim=16)
    assert fuses("mamba1", 64)
    assert fuses("mamba1", 64, d_model=44), "rows in pieces are for few sequences"
    assert not fuses("hybrid", 64)
    assert not fuses("mamba1", 64, torch.float32), "tensor cores would round its products"
    assert not fuses("mamba2_groups", 1, d_model=176, n_groups=4, head_dim=22, d_state=6)


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))
