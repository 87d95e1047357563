"""The loss on a GPU against its definition in fp64: dtypes, sizes, options, memory, 64-bit offsets."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.dispatch import triton_unsupported
from kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IGNORED = -100
# Of the gradients: those of the logits are rounded once to the dtype of the products, those of hidden once more.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
GIB = 2**30


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN: an output that no one writes is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic algorithms without it
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    tokens: int, vocabulary: int, channels: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a standard deviation of 2."""
    hidden = torch.randn(tokens, channels, device="cuda").to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocabulary, channels, device="cuda") / channels**0.5).to(weight_dtype or dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    targets[torch.rand(tokens, device="cuda") < 0.2] = IGNORED
    return hidden, weight.requires_grad_(), targets


def definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token, and the gradients of `scale` times their sum, in fp64."""
    exact_hidden, exact_weight = (v.detach().to(hidden.dtype).double().requires_grad_() for v in (hidden, weight))
    logits = exact_hidden @ exact_weight.t()
    lse = logits.logsumexp(1)
    counted = targets != IGNORED
    losses = (lse - logits.gather(1, targets.where(counted, 0)[:, None])[:, 0] + z_loss * lse.square()) * counted
    return losses.detach(), *torch.autograd.grad(scale * losses.sum(), (exact_hidden, exact_weight))


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.isfinite(actual).all(), name
    error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6))
    assert error < tolerance, f"{name}: relative error {error:.1e}"
    worst = float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert worst < 4 * tolerance, f"{name}: an element is off by {worst:.1e} of the largest"


def check(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, chunk_size: int | None = None) -> None:
    assert triton_unsupported(hidden) is None, "the Triton kernel did not run"

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk_size=chunk_size)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, 0.5))

    losses, *grads = definition(hidden, weight, targets, z_loss, scale=0.5)
    ours, again = run(), run()
    with torch.no_grad():
        tokens = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk_size=chunk_size, reduction="none")
    assert_near("losses", tokens, losses, 2e-6)
    assert_near("loss", ours[0], losses.sum(), 2e-6)
    for name, actual, repeated, expected, like in zip(
        ("hidden", "weight"), ours[1:], again[1:], grads, (hidden, weight), strict=True
    ):
        assert actual.dtype == like.dtype
        assert torch.equal(actual, repeated), f"gradient of {name} differs between two runs"
        assert_near(f"gradient of {name}", actual, expected, ROUNDING[hidden.dtype])
    assert torch.equal(ours[0], again[0])


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "channels", "chunk"),
    [
        (1, 1, 8, None),
        (7, 2, 16, 3),
        (300, 1000, 64, 128),
        (257, 4099, 40, 100),
        (700, 20003, 64, 50),
        (64, 32001, 24, None),
        (1000, 50280, 96, 384),
        (50, 151936, 64, None),
    ],
)
def test_sizes(tokens: int, vocabulary: int, channels: int, chunk: int | None, dtype: torch.dtype) -> None:
    check(*draw(tokens, vocabulary, channels, dtype), chunk_size=chunk)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_z_loss(dtype: torch.dtype) -> None:
    check(*draw(300, 5000, 64, dtype), z_loss=1e-2)


def test_masters_in_fp32() -> None:
    hidden, weight, targets = draw(500, 5000, 64, torch.bfloat16, torch.float32)
    check(hidden, weight, targets)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        check(hidden, weight, targets)


def test_rows_of_a_wider_tensor_and_a_transposed_weight() -> None:
    wide = torch.randn(300, 100, device="cuda", dtype=torch.bfloat16)
    _, weight, targets = draw(300, 1001, 64, torch.bfloat16)
    hidden, weight = wide[:, 4:68].requires_grad_(), weight.detach().t().contiguous().t().requires_grad_()
    check(hidden, weight, targets)


def test_nothing_counted() -> None:
    hidden, weight, targets = draw(100, 1000, 64, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), z_loss=1e-3)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_only_one_gradient() -> None:
    hidden, weight, targets = draw(200, 3000, 64, torch.bfloat16)
    _, *expected = definition(hidden, weight, targets)
    for index, wanted in enumerate((hidden, weight)):
        inputs = [value.detach().requires_grad_(value is wanted) for value in (hidden, weight)]
        (grad,) = torch.autograd.grad(linear_cross_entropy(*inputs, targets), [inputs[index]])
        assert_near("gradient", grad, expected[index], ROUNDING[torch.bfloat16])


def test_logits_that_are_large() -> None:
    hidden, weight, targets = draw(200, 3000, 64, torch.float32)
    check((100 * hidden.detach()).requires_grad_(), weight, targets)


def test_compile_breaks_no_graph() -> None:
    hidden, weight, targets = draw(300, 3000, 64, torch.bfloat16, torch.float32)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h * 1.5, w, targets, z_loss=1e-3) / 300

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-5)


def test_capture_in_a_cuda_graph() -> None:
    hidden, weight, targets = draw(300, 3000, 64, torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, targets)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    torch.cuda.synchronize()  # the other stream does not wait for the inputs
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        targets.copy_(torch.randint_like(targets, 3000))
    graph.replay()
    for actual, expected in zip(found, run(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.large_memory(8)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_above_inputs_and_outputs(weight_dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    hidden, weight, targets = draw(32 * 2048, 50280, 768, torch.bfloat16, weight_dtype)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    peak = torch.cuda.max_memory_allocated() - before - sum(grad.nbytes for grad in grads)
    print(f"peak above inputs and outputs: {peak / GIB:.3f} GiB")
    assert peak < 1.5 * GIB


@pytest.mark.large_memory(40)
@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "one chunk"])
def test_more_than_2_to_the_31_logits(whole: bool) -> None:
    """A buffer of 2^31 logits is one that only a chunk_size asks for; more tokens than that are the usual case."""
    torch.use_deterministic_algorithms(False)
    tokens, vocabulary = 43_008, 50_280
    assert tokens * vocabulary > 2**31
    hidden, weight, targets = draw(tokens, vocabulary, 64, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=tokens if whole else None)
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    exact_loss, exact_weight_grad = 0.0, torch.zeros_like(weight, dtype=torch.float64)
    for begin in range(0, tokens, 2048):
        part = slice(begin, begin + 2048)
        losses, expected, part_grad = definition(hidden[part], weight, targets[part])
        assert_near(f"gradient of tokens from {begin}", hidden_grad[part], expected, ROUNDING[torch.bfloat16])
        exact_loss += float(losses.sum())
        exact_weight_grad += part_grad
    assert abs(float(loss) - exact_loss) < 1e-5 * exact_loss
    assert_near("gradient of weight", weight_grad, exact_weight_grad, ROUNDING[torch.bfloat16])


WRONG_TARGET = """
import torch
from kernels.linear_cross_entropy import linear_cross_entropy
hidden, weight = torch.randn(4, 8, device="cuda"), torch.randn(5, 8, device="cuda")
linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 5, -100], device="cuda"))
torch.cuda.synchronize()
"""


def test_a_target_out_of_the_vocabulary_stops_the_device(repository: Path) -> None:
    result = subprocess.run([sys.executable, "-c", WRONG_TARGET], cwd=repository, capture_output=True, text=True)
    assert result.returncode != 0
    assert "a target is neither 0 to 4 nor ignore_index=-100" in result.stdout + result.stderr
