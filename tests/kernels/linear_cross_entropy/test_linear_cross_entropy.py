"""The chunked linear cross-entropy against the softmax written out."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels.linear_cross_entropy import linear_cross_entropy, reference
from tests.kernels.loops import LENGTHS, assert_all_close, gradients, largest_tensor_in

VOCABULARY, CHANNELS, IGNORED = 11, 5, -100


def loss_loop(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED, z_loss: float = 0.0
) -> Tensor:
    """The loss of each token, one token after another."""
    losses = []
    for row, target in zip(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).tolist(), strict=True):
        probabilities = torch.exp(weight @ row)
        if target == ignore_index:
            losses.append(row.sum() * 0)
        else:
            total = probabilities.sum()
            losses.append(-(probabilities[target] / total).log() + z_loss * total.log() ** 2)
    return torch.stack(losses).view(targets.shape)


def draw(*rows: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(rows))
    hidden = torch.randn(*rows, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCABULARY, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, VOCABULARY, rows, generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.2] = IGNORED
    return {"hidden": hidden, "weight": weight}, targets


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_equals_the_definition(length: int, chunk_size: int | None) -> None:
    inputs, targets = draw(2, length)
    expected = loss_loop(**inputs, targets=targets)
    actual = linear_cross_entropy(**inputs, targets=targets, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected.sum())
    assert_all_close(gradients((actual * 3,), inputs), gradients((expected.sum() * 3,), inputs), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        tokens = linear_cross_entropy(**inputs, targets=targets, reduction="none", chunk_size=chunk_size)
    torch.testing.assert_close(tokens, expected.detach())


@pytest.mark.parametrize("chunk_size", [4, None])
def test_z_loss(chunk_size: int | None) -> None:
    inputs, targets = draw(2, 9)
    expected = loss_loop(**inputs, targets=targets, z_loss=0.1)
    actual = linear_cross_entropy(**inputs, targets=targets, z_loss=0.1, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected.sum())
    assert_all_close(gradients((actual,), inputs), gradients((expected.sum(),), inputs), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        tokens = linear_cross_entropy(**inputs, targets=targets, z_loss=0.1, reduction="none")
    torch.testing.assert_close(tokens, expected.detach())


def test_gradcheck() -> None:
    inputs, targets = draw(2, 4)
    for wanted in (("hidden", "weight"), ("hidden",), ("weight",)):
        values = [value.detach().requires_grad_(name in wanted) for name, value in inputs.items()]
        assert gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_size=3), values)


def test_another_ignore_index_and_nothing_counted() -> None:
    inputs, targets = draw(2, 9)
    targets[targets == IGNORED] = 0
    actual = linear_cross_entropy(**inputs, targets=targets, ignore_index=0)
    torch.testing.assert_close(actual, loss_loop(**inputs, targets=targets, ignore_index=0).sum())
    nothing = linear_cross_entropy(**inputs, targets=torch.full_like(targets, IGNORED))
    assert nothing == 0
    assert all((value == 0).all() for value in gradients((nothing,), inputs).values())


def test_the_logits_of_the_whole_batch_never_exist() -> None:
    tokens, vocabulary, channels, chunk = 512, 1024, 8, 16
    hidden, weight = torch.randn(tokens, channels), torch.randn(vocabulary, channels)
    targets = torch.randint(0, vocabulary, (tokens,))
    summed, each = reference.linear_cross_entropy_op._init_fn, reference.token_cross_entropy_op._init_fn
    for function in (
        lambda: summed(hidden, weight, targets, IGNORED, chunk, 0.0, True, True),
        lambda: each(hidden, weight, targets, IGNORED, chunk, 0.0),
    ):
        assert largest_tensor_in(function) <= chunk * vocabulary
    assert reference.default_chunk_size(hidden, weight) * vocabulary <= 2**20


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.999], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(10.0), rtol=1e-3, atol=1e-3)


def test_low_precision() -> None:
    inputs, targets = draw(2, 65)
    low = {"hidden": inputs["hidden"].detach().bfloat16(), "weight": inputs["weight"].detach().float()}
    low = {name: value.requires_grad_() for name, value in low.items()}
    exact = {"hidden": low["hidden"], "weight": low["weight"].bfloat16()}
    exact = {name: value.detach().double().requires_grad_() for name, value in exact.items()}
    actual, expected = linear_cross_entropy(**low, targets=targets), loss_loop(**exact, targets=targets).sum()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
    found, wanted = gradients((actual,), low), gradients((expected,), exact)
    for name in found:
        assert found[name].dtype == low[name].dtype
        assert (found[name].double() - wanted[name]).abs().max() / wanted[name].abs().max() < 2e-2


def test_any_strides() -> None:
    inputs, targets = draw(3, 2)
    expected = linear_cross_entropy(**inputs, targets=targets)
    actual = linear_cross_entropy(
        inputs["hidden"].transpose(0, 1), inputs["weight"].t().contiguous().t(), targets.transpose(0, 1)
    )
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


def test_opcheck() -> None:
    inputs, targets = draw(9)
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.mamba_train.linear_cross_entropy.default,
            (inputs["hidden"], inputs["weight"], targets, IGNORED, 4, 1e-3, *flags),
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(
        torch.ops.mamba_train.token_cross_entropy.default,
        (inputs["hidden"].detach(), inputs["weight"].detach(), targets, IGNORED, 4, 1e-3),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs, targets = draw(2, 9)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    actual, expected = compiled(**inputs, targets=targets), linear_cross_entropy(**inputs, targets=targets)
    torch.testing.assert_close(actual, expected)
    assert_all_close(gradients((actual,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-11)


def test_errors() -> None:
    inputs, targets = draw(2, 3)
    hidden, weight = inputs["hidden"], inputs["weight"]
    with pytest.raises(ValueError, match="reduction='none' is for evaluation"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")
    with pytest.raises(ValueError, match=r"weight has shape \(11, 4\), expected \(vocabulary, channel=5\)"):
        linear_cross_entropy(hidden, weight[:, :4], targets)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 2\) and dtype torch.int64, expected \(2, 3\)"):
        linear_cross_entropy(hidden, weight, targets[:, :2])
    with pytest.raises(ValueError, match="chunk_size is 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_size=0)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"z_loss is -0.1, expected at least 0"):
        linear_cross_entropy(hidden, weight, targets, z_loss=-0.1)
    for wrong in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=f"hold {wrong}, expected 0 to 10"):
            linear_cross_entropy(hidden, weight, torch.full((2, 3), wrong))
