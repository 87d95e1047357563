"""Chunked linear cross-entropy in plain PyTorch; a chunk's logits become its gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator

CPU_LOGITS = 2**20  # 4 MiB in fp32, which its caches hold
GPU_LOGITS = 2**26  # 0.25 GiB in fp32; fused.py has twice as much for the gradients of several chunks in bf16
ROWS = 128  # of a tile of a matrix product on a GPU


def default_chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits are at most `CPU_LOGITS` or `GPU_LOGITS`, on a GPU in whole tiles where one fits."""
    if hidden.device.type == "cpu":
        return max(1, CPU_LOGITS // weight.shape[0])
    tokens = GPU_LOGITS // weight.shape[0]
    return max(1, tokens - tokens % ROWS if tokens > ROWS else tokens)


@operator("mamba_train::linear_cross_entropy")
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int,
    z_loss: float,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and the gradients of hidden (tokens, channel) and weight, empty where not needed."""
    _check_targets(targets, ignore_index, weight.shape[0])
    dtype = compute_dtype(hidden)
    weight_cast = weight.to(hidden.dtype)
    loss = hidden.new_zeros((), dtype=dtype)
    hidden_grad = torch.empty_like(hidden if hidden_needs_grad else hidden[:0])
    weight_grad = weight.new_zeros(weight.shape if weight_needs_grad else (0,), dtype=dtype)
    for begin in range(0, hidden.shape[0], chunk_size):
        tokens = slice(begin, begin + chunk_size)
        logits, normalizer, losses, counted = _losses(
            hidden[tokens], weight_cast, targets[tokens], ignore_index, z_loss
        )
        loss += losses.sum()
        if not (hidden_needs_grad or weight_needs_grad):
            continue
        logits_grad = logits.exp_().mul_(1 + 2 * z_loss * normalizer)
        picked = targets[tokens].masked_fill(~counted, 0).unsqueeze(1)
        logits_grad.scatter_add_(1, picked, logits_grad.new_full(picked.shape, -1.0))
        logits_grad.mul_(counted.unsqueeze(1))
        logits_grad = logits_grad.to(hidden.dtype)
        if hidden_needs_grad:
            torch.mm(logits_grad, weight_cast, out=hidden_grad[tokens])
        if weight_needs_grad:
            weight_grad += logits_grad.t() @ hidden[tokens]
    return loss, hidden_grad, weight_grad.to(weight.dtype)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, chunk_size, z_loss, hidden_needs_grad, weight_needs_grad):
    return (
        hidden.new_empty((), dtype=compute_dtype(hidden)),
        torch.empty_like(hidden if hidden_needs_grad else hidden[:0]),
        weight.new_empty(weight.shape if weight_needs_grad else (0,)),
    )


@operator("mamba_train::token_cross_entropy")
def token_cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int, z_loss: float
) -> Tensor:
    """Return the loss of each token, (tokens), 0 where ignored."""
    _check_targets(targets, ignore_index, weight.shape[0])
    weight_cast = weight.to(hidden.dtype)
    losses = hidden.new_empty(targets.shape, dtype=compute_dtype(hidden))
    for begin in range(0, hidden.shape[0], chunk_size):
        tokens = slice(begin, begin + chunk_size)
        losses[tokens] = _losses(hidden[tokens], weight_cast, targets[tokens], ignore_index, z_loss)[2]
    return losses


@token_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, chunk_size, z_loss):
    return hidden.new_empty(targets.shape, dtype=compute_dtype(hidden))


def _losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (tokens, vocabulary), log-sum-exps (tokens, 1), losses, which tokens count, of one chunk."""
    logits = (hidden @ weight.t()).to(compute_dtype(hidden))
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    logits -= normalizer
    counted = targets != ignore_index
    picked = logits.gather(1, targets.masked_fill(~counted, 0).unsqueeze(1)).squeeze(1)
    losses = z_loss * normalizer.squeeze(1).square() - picked
    return logits, normalizer, losses * counted, counted


def _check_targets(targets: Tensor, ignore_index: int, vocabulary: int) -> None:
    # Elsewhere than on the CPU looking would wait for the device; there the gather itself traps.
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"linear_cross_entropy: targets of shape {tuple(targets.shape)} hold {int(targets[wrong][0])}, "
            f"expected 0 to {vocabulary - 1} (vocabulary={vocabulary}) or ignore_index={ignore_index}"
        )


def _setup_context(ctx, inputs, output) -> None:
    *_, ctx.hidden_needs_grad, ctx.weight_needs_grad = inputs
    _, hidden_grad, weight_grad = output
    ctx.save_for_backward(hidden_grad, weight_grad)


def _backward(ctx, loss_grad, _hidden_grad_grad, _weight_grad_grad):
    hidden_grad, weight_grad = ctx.saved_tensors
    return (
        (hidden_grad * loss_grad).to(hidden_grad.dtype) if ctx.hidden_needs_grad else None,
        (weight_grad * loss_grad).to(weight_grad.dtype) if ctx.weight_needs_grad else None,
        *(None,) * 6,
    )


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
