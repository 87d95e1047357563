"""What the compiler and the fallback see of the loss on CUDA devices."""

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from kernels import dispatch
from kernels.linear_cross_entropy import fused, linear_cross_entropy, reference


def test_a_number_of_tokens_that_is_a_symbol_stays_one() -> None:
    """Otherwise each number is compiled anew, until torch gives up."""
    shapes = ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=False)
    tokens = mode.from_tensor(torch.empty(357, 8), symbolic_context=dynamic, source=ConstantSource("x")).shape[0]
    with mode:
        hidden = torch.empty(tokens, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(31, 8, device="cuda")
        targets = torch.empty(tokens, device="cuda", dtype=torch.int64)
        before = len(shapes.guards)
        chunk = reference.default_chunk_size(hidden, weight)
        loss, hidden_grad, weight_grad = torch.ops.mamba_train.linear_cross_entropy(
            hidden, weight, targets, -100, chunk, 1e-4, True, True
        )
        token_losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert len(shapes.guards) == before
    assert loss.dtype == weight_grad.dtype == token_losses.dtype == torch.float32
    assert hidden_grad.shape == hidden.shape
    assert hidden_grad.dtype == torch.bfloat16
    assert token_losses.shape == targets.shape


@pytest.mark.parametrize("reason", [None, "the moon is full"])
def test_a_reason_sends_it_to_the_reference(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA devices, called on the CPU."""
    monkeypatch.setattr(dispatch, "_device_unsupported", lambda index: reason)
    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(dispatch, "log_fallback", lambda *line: logged.append(line))
    monkeypatch.setattr(fused, "_softmax", lambda *arguments: None)  # no kernel here
    op = reference.linear_cross_entropy_op
    arguments = (torch.randn(9, 4), torch.randn(11, 4), torch.arange(9), -100, 4, 0.0, True, True)
    expected = op._init_fn(*arguments)
    found = op._backend_fns["cuda"](*arguments)
    assert torch.equal(found[0], expected[0]) is (reason is not None)
    assert logged == ([("linear_cross_entropy", reason)] if reason else [])


def test_the_chunk_of_a_gpu_is_whole_tiles_that_fit() -> None:
    with FakeTensorMode():
        for vocabulary in (2, 1000, 50280, 256_000, 2**30):
            hidden, weight = torch.empty(1, 1, device="cuda"), torch.empty(vocabulary, 1, device="cuda")
            chunk = reference.default_chunk_size(hidden, weight)
            assert chunk == 1 or chunk * vocabulary <= reference.GPU_LOGITS
            assert chunk < 128 or chunk % 128 == 0
