"""An operator registered by this package behaves as one of `torch.library.custom_op`."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.operator import Operator, operator


def scaled(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    return x * factor if weight is None else x * weight * factor


@pytest.fixture
def op() -> Iterator[Operator]:
    made = operator("mamba_train_test::scaled")(scaled)

    @made.register_fake
    def _(x, weight, factor):
        return x.new_empty(x.shape)

    def setup(ctx, inputs, output) -> None:
        x, weight, ctx.factor = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return scaled(grad, weight, ctx.factor), None if weight is None else grad * x * ctx.factor, None

    made.register_autograd(backward, setup_context=setup)
    yield made
    made._library._destroy()


def test_opcheck(op: Operator) -> None:
    for weight in (None, torch.randn(3, requires_grad=True)):
        torch.library.opcheck(op._opoverload, (torch.randn(2, 3, requires_grad=True), weight, 2.0))


def test_gradients(op: Operator) -> None:
    x, weight = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, weight: op(x, weight, 3.0), (x, weight))
    with torch.no_grad():
        assert op(x, weight, 3.0).grad_fn is None
    assert op(x.detach(), None, 3.0).grad_fn is None


@pytest.mark.parametrize("by_name", [False, True])
def test_compiled_as_one_node(op: Operator, by_name: bool) -> None:
    call = op._opoverload if by_name else op
    nodes = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(lambda x: call(x, None, 3.0), fullgraph=True, backend=backend)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(grad, torch.full((4,), 3.0))
    assert [str(node) for node in nodes] == ["mamba_train_test.scaled.default"]


def test_nobody_watches_and_the_dispatcher_is_not_asked(op: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_opoverload", lambda *arguments: pytest.fail("the dispatcher was asked"))
    x, weight = torch.randn(3, requires_grad=True), torch.nn.Parameter(torch.randn(3))
    grads = torch.autograd.grad(op(x, weight, 2.0).sum(), (x, weight))
    assert torch.equal(torch.stack(grads), 2 * torch.stack((weight, x)))
    with torch.no_grad():
        assert torch.equal(op(x, None, 2.0), 2 * x)


class Special(Tensor):
    """A tensor that somebody has made something else of."""


def in_a_dispatch_mode(call: Callable[[Tensor], object]) -> None:
    with FlopCounterMode(display=False):
        call(torch.ones(3))


def in_a_function_mode(call: Callable[[Tensor], object]) -> None:
    with torch.device("cpu"):
        call(torch.ones(3))


def in_a_transform(call: Callable[[Tensor], object]) -> None:
    torch.func.vjp(call, torch.ones(3))


def traced(call: Callable[[Tensor], object]) -> None:
    torch.jit.trace(call, torch.ones(3))


def of_a_subclass(call: Callable[[Tensor], object]) -> None:
    call(torch.ones(3).as_subclass(Special))


def profiled(call: Callable[[Tensor], object]) -> None:
    with profile():
        call(torch.ones(3))


WATCHING = [in_a_dispatch_mode, in_a_function_mode, in_a_transform, traced, profiled, of_a_subclass]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("watched", WATCHING)
def test_who_watches_sees_the_operator(
    op: Operator, watched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def named(x: Tensor, *_: object) -> Tensor:
        seen.append(x)
        return x + 1

    monkeypatch.setattr(op, "_opoverload", named)
    watched(lambda x: op(x, None, 2.0))
    assert seen


def test_a_mode_sees_it_below_autograd(op: Operator) -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, requires_grad=True)
    with Mode():
        op(x, None, 2.0)
    assert seen == [torch.ops.mamba_train_test.scaled.default]


def test_a_kernel_of_a_device_comes_before_the_function_for_all(op: Operator) -> None:
    op.register_kernel("cpu")(lambda x, weight, factor: x - 1)
    assert torch.equal(op(torch.ones(2), None, 2.0), torch.zeros(2))


def test_without_values_only_shapes_are_found(op: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_init_fn", lambda *arguments: pytest.fail("there is nothing to compute"))
    for x in (torch.ones(3, device="meta"), torch.ones(3, device="meta", requires_grad=True)):
        assert op(x, None, 2.0).shape == (3,)


def test_what_it_writes_into_is_known_to_the_compiler() -> None:
    def fill(x: Tensor, into: Tensor) -> Tensor:
        into.copy_(x)
        return x.sum()

    made = operator("mamba_train_test::fill", mutates_args=("into",))(fill)
    made.register_fake(lambda x, into: x.new_empty(()))

    def run(x: Tensor) -> Tensor:
        halves = x.new_zeros(2, 4)
        total = torch.ops.mamba_train_test.fill(x, halves[:, 2:])
        return halves * total

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    made._library._destroy()


def test_what_it_writes_into_has_another_version() -> None:
    def fill(x: Tensor, into: Tensor) -> Tensor:
        into.copy_(x)
        return x.sum()

    made = operator("mamba_train_test::fill_again", mutates_args=("into",))(fill)
    into = torch.zeros(3)
    before = into._version
    made(torch.ones(3), into)
    assert into._version > before
    made._library._destroy()
