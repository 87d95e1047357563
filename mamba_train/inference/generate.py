"""Tokens from a trained model, for a batch of prompts, one position at a time."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

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
    state_dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """The tokens that continue each of the prompts, up to `max_new_tokens` of them.

    A row ends before its `stop_token`, and after a token for which on_token(row, token) is true, which is called as the
    tokens come. Ids from `vocab_size` on are padding and never chosen. cuda_graph, state_dtype: see
    `Decoder`. Raises ValueError for an empty prompt and for logits that are not finite.
    """
    decoder = Decoder(model, prompts, cuda_graph, state_dtype)
    draws = uniform_draws(sampling, len(prompts), decoder.logits.device)
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for position in range(max_new_tokens):
        tokens = choose(decoder.logits[:, :vocab_size], sampling, next(draws))
        chosen = _Reading(tokens)
        is_last = position == max_new_tokens - 1
        # Rows that have ended are carried along: the batch keeps its shape.
        advance = partial(decoder.step, tokens)
        if tokens.is_cuda and not is_last:
            advance()  # so that the GPU has something to do while the tokens are looked at; at the end in vain
        for row, token in enumerate(chosen.result()):
            if row in open_rows and _ends(row, token, texts[row], stop_token, on_token):
                open_rows.discard(row)
        if not open_rows:
            break
        if not tokens.is_cuda and not is_last:
            advance()
    return texts


def _ends(row: int, token: int, text: list[int], stop_token: int | None, on_token: EndsRow) -> bool:
    """Add a token to the text of a row; whether the row ends with it."""
    if token == NOT_FINITE:
        raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
    if token == stop_token:
        return True
    text.append(token)
    return on_token(row, token)


class _Reading:
    """Tokens on their way to the CPU, which waits for them alone and not for what the GPU is given to do after."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._arrived = tokens, None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tokens.tolist()
