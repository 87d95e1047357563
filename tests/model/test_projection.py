"""Projections with fp32 gradients of their weights, which GPUs take under autocast; here on the CPU."""

import pytest
import torch
from torch import Tensor

from mamba_train.model import projection
from mamba_train.model.projection import MixedProduct, Projection, rows_at_once, weight_gradient
from tests.model.test_fused_ssm import D_MODEL, fused_node, gradients, make_mixer, plain


@pytest.fixture
def always_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Projection, "forward", lambda self, x: MixedProduct.apply(x, self.weight))


def test_gradients() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MixedProduct.apply, (x, weight))


def test_the_gradient_of_a_weight_has_its_dtype() -> None:
    x, y_grad = torch.randn(50, 8).bfloat16(), torch.randn(50, 3).bfloat16()
    weight = torch.randn(3, 8, requires_grad=True)
    y = MixedProduct.apply(x, weight)
    assert torch.equal(y, x @ weight.bfloat16().t())
    (found,) = torch.autograd.grad(y, [weight], y_grad)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ((8512, 2048), 8448),  # 34 x 16 tiles are 16 more than four rounds of 132
        ((8448, 2048), 8448),
        ((8192, 2048), 8192),
        ((10240, 2560), 10240),
        ((10576, 2560), 10576),  # a round is not saved
        ((3352, 768), 3352),
        ((192, 5120), 192),  # less than a tile
    ],
    ids=str,
)
def test_a_tile_in_part_costs_no_round(sizes: tuple[int, int], first: int) -> None:
    assert rows_at_once(*sizes, 132) == first


@pytest.mark.parametrize("first", [3, 5])
def test_a_large_gradient_at_once_or_in_two_parts(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y_grad = torch.randn(3, 50, 8).bfloat16(), torch.randn(3, 50, 5).bfloat16()
    expected = weight_gradient(y_grad, x, torch.float32)

    class OnGPU(Tensor):
        is_cuda = True

    monkeypatch.setattr(projection, "LARGEST_IN_FP32", 0)
    monkeypatch.setattr(projection, "processors", lambda index: 132)
    monkeypatch.setattr(projection, "rows_at_once", lambda *sizes: first)
    found = weight_gradient(y_grad, x.as_subclass(OnGPU), torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("always_mixed")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_mixer_whose_gradients_share_memory(recompute: bool) -> None:
    """out_proj writes the gradient of the SSM's output where the gradient of z will be."""
    mixer = make_mixer()
    mixer.ssm.recompute_scan = recompute
    hidden = torch.randn(2, 9, D_MODEL, dtype=torch.float64, requires_grad=True)
    y = mixer(hidden)
    node, halves, walks, shared = fused_node(y), [], [], []

    def note(grads: tuple[Tensor, ...]) -> None:
        walks.append(node.wide_grad.data_ptr())
        halves.append(grads[0].data_ptr() == node.wide_grad.chunk(2, dim=-1)[1].data_ptr())

    def note_after(grads: tuple[Tensor, ...]) -> None:
        shared.append(grads[0].data_ptr() == walks[-1])

    node.register_prehook(note)
    node.next_functions[0][0].register_prehook(note_after)
    expected = gradients(mixer, hidden, plain(mixer, hidden, None))
    for name, grad in gradients(mixer, hidden, y).items():
        torch.testing.assert_close(grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert halves == shared == [True]


@pytest.mark.usefixtures("always_mixed")
def test_memory_of_a_gradient_that_someone_else_has() -> None:
    """What out_proj's backward gave away in an earlier walk is not written over in another."""
    mixer = make_mixer()
    hidden = torch.randn(1, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    y = mixer.ssm(mixer.in_proj(hidden))
    given = torch.autograd.grad(mixer.out_proj(y).sum(), y)[0]
    before = given.clone()
    torch.autograd.grad(y, hidden, torch.ones_like(y))
    assert torch.equal(given, before)


@pytest.mark.usefixtures("always_mixed")
@pytest.mark.parametrize("who", ["asked for", "hook of the tensor", "hook of the node", "later hook"])
def test_memory_of_a_gradient_that_is_kept(who: str) -> None:
    """Whoever asks for the gradient of the SSM's output, or keeps it in a hook, has that and not the one of z."""
    mixer = make_mixer()
    hidden = torch.randn(1, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    y = mixer.ssm(mixer.in_proj(hidden))
    kept: list[Tensor] = []
    if who == "hook of the tensor":
        y.register_hook(kept.append)
    if who == "hook of the node":
        y.grad_fn.register_prehook(lambda grads: kept.extend(grads))  # type: ignore[union-attr]
    out = mixer.out_proj(y)
    if who == "later hook":
        y.register_hook(kept.append)
    if who == "asked for":
        kept.append(torch.autograd.grad(out.sum(), [y, hidden])[0])
    else:
        out.sum().backward()
    torch.testing.assert_close(kept[0], mixer.out_proj.weight.sum(0).expand_as(y))
