"""From logits to tokens, for all rows of a batch at once and without a look from the CPU."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decode import greedy
from kernels.dispatch import triton_unsupported

NOT_FINITE = -1


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature: 0 takes the most likely token each time. top_k: only so many of the most likely ones; None: all.
    top_p: only the smallest set of tokens with that much probability (arXiv 1904.09751, section 3.1), among what top_k
    left. seed: of the draws; row i draws as row 0 does with seed + i, so a text does not depend on the rows before it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token for each row, int64 (rows,); NOT_FINITE where the logits are not.

    logits: (rows, vocabulary), any dtype; uniform: (rows,) in [0, 1), which decides the draw.
    """
    if sampling.temperature == 0 and logits.is_cuda and triton_unsupported(logits) is None:
        return greedy(logits, logits.shape[-1], NOT_FINITE)  # one kernel in place of nine
    logits = logits.float()
    tokens = logits.argmax(-1) if sampling.temperature == 0 else _draw(logits, sampling, uniform)
    # Not an exception here: to look at the values would make a GPU wait.
    return tokens.masked_fill(~logits.isfinite().all(-1), NOT_FINITE)


def _draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    else:
        logits, order = logits.sort(descending=True)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    # Keep a token when the mass before it is still below top_p: at least one is always kept.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < sampling.top_p)
    reached = probabilities.cumsum(-1)
    place = (reached <= uniform.to(reached).unsqueeze(-1) * reached[:, -1:]).sum(-1, keepdim=True)
    # The last token that is kept, where rounding leads past it.
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(-1, torch.minimum(place, last)).squeeze(-1)


def uniform_draws(sampling: Sampling, rows: int, device: torch.device) -> Iterator[Tensor]:
    """For each token of a text one number for each row, (rows,) in [0, 1); the same on every kind of device."""
    if sampling.temperature == 0:
        none = torch.zeros(rows, device=device)
        while True:
            yield none
    generators = [torch.Generator().manual_seed((sampling.seed + row) % 2**63) for row in range(rows)]
    while True:
        drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        # From pinned memory, else the copy would wait for all that the GPU has been given to do.
        yield drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
