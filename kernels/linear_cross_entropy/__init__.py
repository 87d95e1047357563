"""The last projection and the cross-entropy of its logits, without ever holding all logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.checks import check_floating, check_same_device, check_tensor, needs_gradient
from kernels.linear_cross_entropy import (
    dispatch,  # noqa: F401  registers torch.ops.mamba_train.linear_cross_entropy
    reference,
)

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the cross-entropy, in nats, of the logits `hidden @ weight.T` against `targets`.

    Shapes: hidden (..., channel); weight (vocabulary, channel), padded entries being classes like any other;
    targets (...) int64, where `ignore_index` counts for nothing. `z_loss` times the square of the log-sum-exp of the
    logits is added to the loss of each token (arXiv 2204.02311, section 5). Logits exist for `chunk_size` tokens at a
    time (None: as many as fill about 4 MiB on the CPU, 256 MiB on a GPU). Products are taken in the dtype of hidden,
    the softmax in fp32 (fp64 for fp64).

    "sum" returns the fp32 sum over tokens and is differentiable in hidden and weight: the gradients are computed
    with the loss, so the backward only scales them. "none" returns one loss for each token, of the shape of
    targets, 0 where ignored; it is for evaluation and raises ValueError when a gradient would be needed.

    Raises ValueError naming the argument that does not fit; on the CPU also for a target out of the vocabulary, which
    on a GPU fails an assertion of the device.
    """
    _check(hidden, weight, targets, reduction, z_loss, chunk_size)
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = reference.default_chunk_size(hidden, weight) if chunk_size is None else chunk_size
    if reduction == "none":
        if needs_gradient(hidden, weight):
            raise ValueError(
                "linear_cross_entropy: reduction='none' is for evaluation and has no gradient; "
                "use reduction='sum', or call it under torch.no_grad()"
            )
        losses = torch.ops.mamba_train.token_cross_entropy.default(
            rows, weight, targets.reshape(-1), ignore_index, chunk, z_loss
        )
        return losses.reshape(targets.shape)
    loss, _, _ = torch.ops.mamba_train.linear_cross_entropy.default(
        rows, weight, targets.reshape(-1), ignore_index, chunk, z_loss, needs_gradient(hidden), needs_gradient(weight)
    )
    return loss


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, z_loss: float, chunk_size: int | None
) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() < 1:
        raise ValueError(f"{name}: hidden has shape {tuple(hidden.shape)}, expected (..., channel)")
    check_tensor(name, "weight", weight, [("vocabulary", None), ("channel", hidden.shape[-1])])
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{name}: targets has shape {tuple(targets.shape)} and dtype {targets.dtype}, "
            f"expected {tuple(hidden.shape[:-1])} and int64"
        )
    check_floating(name, hidden=hidden, weight=weight)
    check_same_device(name, "hidden", hidden=hidden, weight=weight, targets=targets)
    if reduction not in ("sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'sum' or 'none'")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size is {chunk_size}, expected at least 1 token")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{name}: z_loss is {z_loss}, expected at least 0")
