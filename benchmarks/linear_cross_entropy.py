"""The linear cross-entropy beside a projection, a cast to fp32 and PyTorch's cross_entropy: time and memory.

    python -m benchmarks.linear_cross_entropy [--sweep]

One process, one GPU, bf16 activations and fp32 master weights, as in training. GPU times are medians over replays of a
CUDA graph, with the middle half's spread; eager times are what a user sees. `--sweep` times chunk sizes and launch
parameters of the Triton kernel at the first shape instead.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.selective_scan import ask_device, copy_bytes_per_second, eager_time, graph_time
from kernels.linear_cross_entropy import fused, linear_cross_entropy, reference

GIB = 2**30
# tokens, d_model, vocabulary
ROWS = [(32 * 2048, 768, 50280), (8 * 2048, 768, 50280), (16 * 2048, 2048, 50280), (2048, 2560, 50280)]
# Elements in registers, elements at a time of the others, warps.
LAUNCHES = [(2**15, 4096, 16), (2**15, 8192, 16), (2**15, 8192, 32), (2**14, 1024, 8), (2**14, 2048, 8)]
LAUNCHES += [(2**14, 4096, 8), (2**14, 4096, 16), (2**13, 2048, 4), (2**13, 2048, 8), (2**12, 4096, 32)]
# Tokens of a chunk, chunks whose gradients are multiplied at once.
CHUNKS = [(128, 56), (256, 28), (384, 18), (512, 13), (640, 10), (1280, 2), (1280, 4), (1280, 8), (2560, 1), (2560, 4)]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a model without a fused loss computes under autocast."""
    logits = hidden @ weight.to(hidden.dtype).t()
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def draw(tokens: int, channels: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, channels, device="cuda")).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device="cuda")


def both_ways(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(*inputs), inputs[:2])


def peak_gib(call: Callable[[], object], inputs: tuple[Tensor, ...]) -> float:
    """Of a call, above its inputs and the gradients that it returns."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before - sum(value.nbytes for value in inputs[:2])) / GIB


def product_flops_per_second() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * 8192**3 / graph_time(lambda: a @ b).median


def row(tokens: int, channels: int, vocabulary: int, flops: float, bytes_per_second: float) -> str:
    inputs = draw(tokens, channels, vocabulary)
    cells, medians = [], []
    for loss in (linear_cross_entropy, unfused):
        call = both_ways(loss, inputs)
        peak, eager = peak_gib(call, inputs), eager_time(call, calls=5)
        torch.cuda.empty_cache()
        time = graph_time(call, replays=7)
        gc.collect()
        torch.cuda.empty_cache()
        medians.append(time.median)
        cells.append(f"{time} {eager:8.3f} {peak:6.2f}")
    logits = tokens * vocabulary
    products = 1e3 * 6 * logits * channels / flops
    # Logits are written and read once in fp32, their gradient is written once and read by two products in bf16.
    traffic = 1e3 * (4 + 4 + 2 + 2 + 2) * logits / bytes_per_second
    return (
        f"{tokens:6d} {channels:5d} {vocabulary:6d} | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:5.2f}x"
        f" | {products:8.3f} {traffic:8.3f}"
    )


def compare() -> None:
    flops, rate = product_flops_per_second(), copy_bytes_per_second()
    print(
        f"products of 8192 x 8192: {flops / 1e12:.0f} TFLOP/s, copy {rate / 1e12:.2f} TB/s; {ask_device('clocks.sm')}"
    )
    print("forward + backward: GPU ms by graph replay, eager ms, peak GiB above inputs and gradients")
    print("floors, ms: 'products' = three at the rate above; 'traffic' = logits and their gradients at the copy rate")
    print(
        "tokens d_model vocab. | ours                             | unfused, fp32 log-softmax        |  ratio | floors"
    )
    shapes = ROWS.copy()
    for _ in range(5):
        shapes.append((random.randint(500, 20_000), 64 * random.randint(4, 48), random.randint(8_000, 100_000)))
    for shape in shapes:
        print(row(*shape, flops, rate), flush=True)


def sweep() -> None:
    inputs = draw(*ROWS[0])
    vocabulary = ROWS[0][2]
    print("tokens of a chunk, chunks whose gradients are multiplied at once: ms forward + backward, peak GiB")
    usual = fused.GRADIENT_CHUNKS
    for chunk, together in CHUNKS:
        fused.GRADIENT_CHUNKS = together
        call = both_ways(lambda *values, chunk=chunk: linear_cross_entropy(*values, chunk_size=chunk), inputs)
        time, peak = graph_time(call, replays=5), peak_gib(call, inputs)
        print(f"  {chunk:5d} {together} {time}  {peak:.2f}", flush=True)
        torch.cuda.empty_cache()
    fused.GRADIENT_CHUNKS = usual
    rows = reference.default_chunk_size(inputs[0], inputs[1])
    logits, grads = fused._buffers(inputs[0], vocabulary, rows, with_grad=True)
    targets, losses, hidden = inputs[2][:rows], torch.empty(rows, device="cuda"), inputs[0].detach()
    together = grads.shape[0]
    parts = {
        f"logits of {rows} tokens": lambda: torch.mm(hidden[:rows], matrix.t(), out_dtype=torch.float32, out=logits),
        f"d_hidden of {together}": lambda: torch.mm(grads, matrix),
        "d_weight": lambda: torch.addmm(total, grads.t(), hidden[:together], out_dtype=torch.float32, out=total),
    }
    matrix, total = inputs[1].detach().bfloat16(), torch.zeros_like(inputs[1], requires_grad=False)
    print("products, ms: " + ", ".join(f"{k} {graph_time(c).median:.3f}" for k, c in parts.items()))
    print("softmax of a chunk with its gradient: elements in registers, elements at a time, warps: ms")
    chosen = fused.launch_for
    for launch in LAUNCHES:
        fused.launch_for = lambda columns, launch=launch: fused.Launch(*launch)
        call = lambda: fused._softmax(logits, grads, targets, losses, vocabulary, -100, 0.0, True)  # noqa: E731
        print(f"  {' '.join(f'{value:5d}' for value in launch)} {graph_time(call)}", flush=True)
    fused.launch_for = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="chunk sizes and launch parameters instead")
    arguments = parser.parse_args()
    print(ask_device("name,driver_version,clocks.max.sm,clocks.max.mem"))
    print(f"torch {torch.__version__}; bf16 activations, fp32 weights")
    sweep() if arguments.sweep else compare()


if __name__ == "__main__":
    main()
