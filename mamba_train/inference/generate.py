"""Tokens from a trained model, for a batch of prompts, one position at a time."""

from collections.abc import Callable, Sequence

import torch

from mamba_train.inference.decoder import Decoder
from mamba_train.inference.sampling import NOT_FINITE, Sampling, choose, uniform_draws
from mamba_train.model.language_model import MambaLM

EndsRow = Callable[[int, int], bool]


def goes_on(row: int, token: int) -> bool:
    """Ends no row before it has all the tokens that were asked for."""
    return False


@torch.no_grad()
def generate(
    model: MambaLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    vocab_size: int,
    stop_token: int | None = None,
    on_token: EndsRow = goes_on,
    cuda_graph: bool | None = None,
) -> list[list[int]]:
    """The tokens that continue each of the prompts, up to `max_new_tokens` of them.

    A row ends before its `stop_token`, and after a token for which on_token(row, token) is true, which is called as the
    tokens come. Ids from `vocab_size` on are padding and never chosen. cuda_graph: see `Decoder`.
    Raises ValueError for an empty prompt and for logits that are not finite.
    """
    decoder = Decoder(model, prompts, cuda_graph)
    draws = uniform_draws(sampling, len(prompts), decoder.logits.device)
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for position in range(max_new_tokens):
        tokens = choose(decoder.logits[:, :vocab_size], sampling, next(draws))
        chosen = tokens.tolist()
        for row in sorted(open_rows):
            if chosen[row] == NOT_FINITE:
                raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
            if chosen[row] == stop_token:
                open_rows.discard(row)
                continue
            texts[row].append(chosen[row])
            if on_token(row, chosen[row]):
                open_rows.discard(row)
        if not open_rows or position == max_new_tokens - 1:
            break
        # Rows that have ended are carried along: the batch keeps its shape.
        decoder.step(tokens.clamp(min=0))
    return texts
