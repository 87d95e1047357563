"""Under `torch.compile` the CUDA scan is one node, whose shapes follow from those of its inputs."""

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import kernels.selective_scan  # noqa: F401  registers the operator
from kernels.selective_scan.cuda import scan


@pytest.mark.parametrize("gated", [False, True])
def test_a_length_that_is_a_symbol_stays_one(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each length is compiled anew, until torch gives up."""
    monkeypatch.setattr(scan, "unsupported", lambda x, states: None)
    shapes = ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False)
    length = mode.from_tensor(torch.empty(2, 357, 64), symbolic_context=dynamic, source=ConstantSource("x")).shape[1]
    with mode:
        x, dt, z = (torch.empty(2, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        B, C = (torch.empty(2, length, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        A = torch.empty(64, 16, device="cuda")
        before = len(shapes.guards)
        y, final_state, starts, ungated = torch.ops.mamba_train.selective_scan(
            x, dt, A, B, C, None, z if gated else None, None, True, None, None, True
        )
    assert len(shapes.guards) == before
    assert y.shape == x.shape
    assert final_state.shape == (2, 64, 16)
    assert ungated.shape == (x.shape if gated else (0,))
    assert [int(size) for size in starts.shape] == [2, 23, 64, 16]
