"""The fused loss with its Triton kernel interpreted on the CPU, against the definition in fp64; run by test_fused."""

import pytest
import torch
from torch import Tensor

from kernels.linear_cross_entropy import fused

IGNORED = -100
ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned_and_small(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Outputs that no one writes are NaN; some of a row in registers, several blocks to the rest."""
    monkeypatch.setattr(fused, "launch_for", lambda columns: fused.Launch(min(16, columns), block=32, warps=4))
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def draw(tokens: int, vocabulary: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (scale * torch.randn(tokens, 16)).to(dtype)
    weight = torch.randn(vocabulary, 16).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[torch.rand(tokens) < 0.3] = IGNORED
    return hidden, weight, targets


def definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, ignored: int = IGNORED
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token, and the gradients of their sum, in fp64."""
    hidden, weight = (value.double().requires_grad_() for value in (hidden, weight))
    counted = targets != ignored
    logits = hidden @ weight.t()
    lse = logits.logsumexp(1)
    losses = (lse - logits.gather(1, targets.where(counted, 0)[:, None])[:, 0] + z_loss * lse.square()) * counted
    return losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))


def assert_near(actual: Tensor, expected: Tensor, error: float) -> None:
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).norm() <= error * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"), [(1, 1, 1), (9, 31, 4), (5, 32, 5), (12, 33, 7), (14, 40, 3), (6, 100, 64)]
)
def test_loss_and_gradients(tokens: int, vocabulary: int, chunk: int, dtype: torch.dtype) -> None:
    for z_loss in (0.0, 1e-2):
        hidden, weight, targets = draw(tokens, vocabulary, dtype)
        losses, hidden_grad, weight_grad = definition(hidden, weight, targets, z_loss)
        loss, *grads = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, chunk, z_loss, True, True)
        assert_near(loss, losses.sum(), 1e-5)
        for actual, expected in zip(grads, (hidden_grad, weight_grad), strict=True):
            assert actual.dtype == dtype
            assert_near(actual, expected, ERROR[dtype])
        assert_near(fused.token_losses(hidden, weight, targets, IGNORED, chunk, z_loss), losses, 1e-5)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets = draw(9, 33, torch.float32)
    losses, *expected = definition(hidden, weight, targets, 0.0)
    loss, *grads = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, 4, 0.0, *wanted)
    assert_near(loss, losses.sum(), 1e-5)
    for needed, actual, grad in zip(wanted, grads, expected, strict=True):
        if needed:
            assert_near(actual, grad, 2e-5)
        else:
            assert actual.numel() == 0


def test_weight_in_fp32_beside_bf16_activations() -> None:
    hidden, weight, targets = draw(9, 33, torch.bfloat16)
    _, hidden_grad, weight_grad = fused.linear_cross_entropy(
        hidden, weight.float(), targets, IGNORED, 4, 0.0, True, True
    )
    assert hidden_grad.dtype == torch.bfloat16
    assert weight_grad.dtype == torch.float32
    assert_near(weight_grad, definition(hidden, weight, targets, 0.0)[2], 1e-2)


def test_nothing_counted_and_a_class_as_ignore_index() -> None:
    hidden, weight, targets = draw(9, 33, torch.float32)
    loss, *grads = fused.linear_cross_entropy(
        hidden, weight, torch.full_like(targets, IGNORED), IGNORED, 4, 1e-2, True, True
    )
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)
    targets[targets == IGNORED] = 7
    loss, *grads = fused.linear_cross_entropy(hidden, weight, targets, 7, 4, 1e-2, True, True)
    losses, *expected = definition(hidden, weight, targets, 1e-2, ignored=7)
    for actual, exact in zip((loss, *grads), (losses.sum(), *expected), strict=True):
        assert_near(actual, exact, 2e-5)


def test_no_tokens() -> None:
    hidden, weight, targets = draw(0, 33, torch.float32)
    loss, hidden_grad, weight_grad = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, 4, 0.0, True, True)
    assert loss == 0
    assert hidden_grad.shape == hidden.shape
    assert (weight_grad == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e-6])
def test_logits_far_from_and_near_to_one_another(scale: float) -> None:
    hidden, weight, targets = draw(9, 100, torch.float32, scale)
    losses, hidden_grad, _ = definition(hidden, weight, targets, 0.0)
    loss, actual, _ = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, 4, 0.0, True, False)
    assert_near(loss, losses.sum(), 1e-5)
    assert_near(actual, hidden_grad, 2e-5)


def test_logits_so_low_that_those_behind_the_vocabulary_would_overflow() -> None:
    hidden, weight, targets = torch.full((9, 16), -10.0), 1 + torch.rand(33, 16), torch.randint(0, 33, (9,))
    losses, *expected = definition(hidden, weight, targets, 0.0)
    loss, *grads = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, 4, 0.0, True, True)
    for actual, exact in zip((loss, *grads), (losses.sum(), *expected), strict=True):
        assert_near(actual, exact, 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_seen(bad: float) -> None:
    hidden, weight, targets = draw(4, 70, torch.float32)
    targets[:] = 3
    hidden[2, 0] = bad
    losses = fused.token_losses(hidden, weight, targets, IGNORED, 4, 0.0)
    assert losses.isfinite().tolist() == [True, True, False, True]


def test_a_target_out_of_the_vocabulary() -> None:
    hidden, weight, targets = draw(4, 33, torch.float32)
    for wrong in (33, -1):
        targets[2] = wrong
        with pytest.raises(RuntimeError, match="neither 0 to 32 nor ignore_index=-100"):
            fused.token_losses(hidden, weight, targets, IGNORED, 4, 0.0)


def test_strided_rows() -> None:
    hidden, weight, targets = draw(9, 33, torch.float32)
    wide = torch.randn(9, 40)
    wide[:, 3:19] = hidden
    expected = fused.linear_cross_entropy(hidden, weight, targets, IGNORED, 4, 0.0, True, True)
    actual = fused.linear_cross_entropy(
        wide[:, 3:19], weight.t().contiguous().t(), targets, IGNORED, 4, 0.0, True, True
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
