"""Chunked linear cross-entropy for GPUs: products by the vendor's library, the softmax in one Triton kernel.

A chunk's logits are an fp32 product of bf16 inputs, so they are rounded nowhere before the softmax; its gradient goes
to a second buffer in the dtype of the products, which has room for several chunks: products of more tokens read and
write the weight's gradient less often, which they sum in fp32. Both buffers serve all tokens. docs/kernels.md says why
the gradients are computed with the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_ALIGNMENT = 64  # elements from one row of a buffer to the next: whole lines of the GPU's cache
CLASS_ALIGNMENT = 8  # of the number of classes: bf16 products of other sizes are several times slower
MOST_KEPT = 2**14  # elements of a row in registers: 64 in each thread of 8 warps
GRADIENT_CHUNKS = 4  # of logits, whose gradients are multiplied at once


class Launch(NamedTuple):
    """How the row kernel is launched: elements in registers, elements at a time of the others, warps."""

    kept: int
    block: int
    warps: int


def launch_for(columns: int) -> Launch:
    """The table of launch parameters, from `python -m benchmarks.linear_cross_entropy --sweep`."""
    kept = min(MOST_KEPT, 1 << (columns.bit_length() - 1))
    return Launch(kept, block=1024 if kept <= 4096 else 2048, warps=8)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int,
    z_loss: float,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `mamba_train::linear_cross_entropy`: loss and gradients, which are empty where not needed."""
    check_targets(targets, ignore_index, weight.shape[0])
    vocabulary, matrix = weight.shape[0], _classes(weight, hidden.dtype)
    losses = hidden.new_empty(targets.shape, dtype=torch.float32)
    hidden_grad = torch.empty_like(hidden if hidden_needs_grad else hidden[:0])
    weight_grad = matrix.new_empty(matrix.shape if weight_needs_grad else (0,), dtype=torch.float32)
    if weight_needs_grad and hidden.shape[0] == 0:
        weight_grad.zero_()
    with_grad = hidden_needs_grad or weight_needs_grad
    logits, grads = _buffers(hidden, matrix.shape[0], chunk_size, with_grad)
    with torch.cuda.device_of(hidden):
        for begin in range(0, hidden.shape[0], max(1, grads.shape[0])):
            together = slice(begin, begin + grads.shape[0])
            rows = hidden[together]
            for first in range(0, rows.shape[0], chunk_size):
                part = slice(first, first + chunk_size)
                chunk_logits = logits[: rows[part].shape[0]]
                _product(rows[part], matrix.t(), chunk_logits)
                arguments = (targets[together][part], losses[together][part], vocabulary, ignore_index, z_loss)
                _softmax(chunk_logits, grads[part][: chunk_logits.shape[0]], *arguments, with_grad)
            if hidden_needs_grad:
                torch.mm(grads[: rows.shape[0]], matrix, out=hidden_grad[together])
            if weight_needs_grad:
                _product(grads[: rows.shape[0]].t(), rows, weight_grad, add=begin > 0)
    return losses.sum(), hidden_grad, weight_grad[:vocabulary].to(weight.dtype)


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int, z_loss: float
) -> Tensor:
    """The operator `mamba_train::token_cross_entropy`: the loss of each token."""
    check_targets(targets, ignore_index, weight.shape[0])
    vocabulary, matrix = weight.shape[0], _classes(weight, hidden.dtype)
    losses = hidden.new_empty(targets.shape, dtype=torch.float32)
    logits, _ = _buffers(hidden, matrix.shape[0], chunk_size, with_grad=False)
    with torch.cuda.device_of(hidden):
        for begin in range(0, hidden.shape[0], chunk_size):
            part = slice(begin, begin + chunk_size)
            chunk_logits = logits[: losses[part].shape[0]]
            _product(hidden[part], matrix.t(), chunk_logits)
            arguments = (targets[part], losses[part], vocabulary, ignore_index, z_loss, False)
            _softmax(chunk_logits, chunk_logits, *arguments)
    return losses


def check_targets(targets: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Stop at a target out of the vocabulary as PyTorch's own loss does: by an assertion on the device, seen later."""
    within = (targets >= 0) & (targets < vocabulary)
    message = f"linear_cross_entropy: a target is neither 0 to {vocabulary - 1} nor ignore_index={ignore_index}"
    torch._assert_async((within | (targets == ignore_index)).all(), message)


def _classes(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the dtype of the products, with zeros behind it up to a number of classes that they take fast."""
    vocabulary, channels = weight.shape
    padded = -(-vocabulary // CLASS_ALIGNMENT) * CLASS_ALIGNMENT
    if padded == vocabulary:
        return weight.to(dtype)
    matrix = weight.new_zeros((padded, channels), dtype=dtype)
    matrix[:vocabulary] = weight
    return matrix


def _buffers(hidden: Tensor, columns: int, chunk_size: int, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Logits of one chunk, and their gradients of several; of one, in the same memory, when both are fp32."""
    tokens, stride = hidden.shape[0], -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    logits = hidden.new_empty((min(chunk_size, tokens), stride), dtype=torch.float32)[:, :columns]
    if not with_grad or hidden.dtype == torch.float32:
        return logits, logits
    return logits, hidden.new_empty((min(GRADIENT_CHUNKS * chunk_size, tokens), stride))[:, :columns]


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (fp32) = a @ b, or out += a @ b, summed in fp32 whatever the dtype of a and b."""
    if a.dtype == torch.float32 or not a.is_cuda:  # on the CPU products have no other dtype than their inputs
        if add:
            torch.addmm(out, a.float(), b.float(), out=out)
        else:
            torch.mm(a.float(), b.float(), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _softmax(
    logits: Tensor,
    grads: Tensor,
    targets: Tensor,
    losses: Tensor,
    vocabulary: int,
    ignore_index: int,
    z_loss: float,
    with_grad: bool,
) -> None:
    from kernels.linear_cross_entropy.triton_kernels import cross_entropy_rows

    columns = logits.shape[1]
    launch = launch_for(columns)
    cross_entropy_rows[(logits.shape[0],)](
        *(logits, grads, targets, losses),
        *(vocabulary, *(size // CLASS_ALIGNMENT for size in (columns, logits.stride(0), grads.stride(0)))),
        *(ignore_index, z_loss),
        WITH_GRAD=with_grad,
        GROUP=CLASS_ALIGNMENT,
        EXACT=columns == vocabulary,
        KEPT=launch.kept,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )
