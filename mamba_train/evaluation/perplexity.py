"""Nats and bits per byte of a prepared set, by domain and by position, under a protocol that is named.

A loss depends on how much text the model sees before a token, so two figures compare only under one protocol:

packed    windows of `length` targets lie end to end, and each begins without context. The cheap one, and what
          validation during training does.
sliding   windows of `length` targets lie `stride` apart, and only the last `stride` of each (of the first, all) count:
          each token but those of the first window is predicted from at least `length` - `stride` tokens before it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from mamba_train.data.batches import document_numbers
from mamba_train.data.corpus import Corpus
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.model.language_model import MambaLM

LN_2 = math.log(2)

TokenLosses = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Protocol(StrEnum):
    """How a text is cut into windows; see the top of this module."""

    packed = "packed"
    sliding = "sliding"


@dataclass(frozen=True)
class Windows:
    """How the tokens of a domain are read.

    length: targets in a window. stride: for `sliding`. reset_at_documents: whether the state is reset there, as in
    training. max_tokens: only so many targets from the beginning of each domain; None: all. batch_size: windows at
    once.
    """

    protocol: Protocol
    length: int
    stride: int | None = None
    reset_at_documents: bool = False
    max_tokens: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a window of {self.length} targets: expected at least 1")
        if self.protocol is Protocol.sliding and not 1 <= (self.stride or 0) <= self.length:
            raise ValueError(f"stride {self.stride}: expected 1 to the length of a window ({self.length})")

    def places(self, n_targets: int) -> Iterator[tuple[int, int, int]]:
        """(begin, counted, end) of each window: its targets are [begin, end), those from `counted` on count."""
        done = 0
        while done < n_targets:
            is_sliding = self.protocol is Protocol.sliding and done > 0
            assert self.stride is not None or not is_sliding
            end = min(done + (self.stride if is_sliding and self.stride else self.length), n_targets)
            yield max(0, end - self.length) if is_sliding else done, done, end
            done = end


@dataclass(frozen=True)
class Score:
    """What a model scores on one domain.

    nats: summed over the targets; n_bytes: UTF-8 bytes of their text. by_position: mean nats per target at each
    position of a window, float64 (length,), NaN where no target was.
    """

    nats: float
    n_targets: int
    n_bytes: int
    by_position: np.ndarray

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(1, self.n_targets)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / LN_2 / max(1, self.n_bytes)


def losses_of(model: MambaLM) -> TokenLosses:
    """The loss of each token by a model that is not sharded."""

    def losses(inputs: Tensor, targets: Tensor, seq_idx: Tensor | None) -> Tensor:
        device = model.embedding.weight.device
        seq_idx = None if seq_idx is None else seq_idx.to(device)
        return model(inputs.to(device), targets.to(device), seq_idx, reduction="none")

    return losses


@torch.no_grad()
def score(corpus: Corpus, tokenizer: TextTokenizer, losses: TokenLosses, windows: Windows) -> Score:
    """Score a model on a corpus.

    losses: called with inputs and targets, int64 (rows, up to length), and document numbers, int32 or None; returns
    nats (rows, up to length). Raises ValueError for a corpus of less than two tokens.
    """
    n_targets = corpus.n_tokens - 1
    if n_targets < 1:
        raise ValueError(f"{corpus.folder}: {corpus.n_tokens} tokens are not enough to predict one")
    if windows.max_tokens is not None:
        n_targets = min(n_targets, windows.max_tokens)
    sums, counts = np.zeros(windows.length), np.zeros(windows.length, dtype=np.int64)
    n_bytes = 0
    for group in _groups(windows.places(n_targets), windows.batch_size):
        tokens = np.stack([_read(corpus, begin, end) for begin, _, end in group])
        seq_idx = document_numbers(tokens, corpus.eos_id)[:, :-1] if windows.reset_at_documents else None
        texts = torch.from_numpy(tokens)
        nats = losses(texts[:, :-1], texts[:, 1:], None if seq_idx is None else torch.from_numpy(seq_idx.copy()))
        for row, (begin, counted, end) in enumerate(group):
            place = slice(counted - begin, end - begin)
            sums[place] += nats[row, place].double().cpu().numpy()
            counts[place] += 1
            n_bytes += tokenizer.n_bytes(tokens[row, 1:][place])
    with np.errstate(invalid="ignore"):
        by_position = sums / counts
    return Score(float(sums.sum()), int(counts.sum()), n_bytes, by_position)


def total(scores: Mapping[str, Score]) -> Score:
    """All domains together; the curve by position is the mean over their targets only where it is one domain."""
    first = next(iter(scores.values()))
    by_position = first.by_position if len(scores) == 1 else np.full_like(first.by_position, np.nan)
    return Score(
        sum(one.nats for one in scores.values()),
        sum(one.n_targets for one in scores.values()),
        sum(one.n_bytes for one in scores.values()),
        by_position,
    )


def _groups(places: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Up to `size` windows of one length together."""
    group: list[tuple[int, int, int]] = []
    for place in places:
        if group and (len(group) == size or place[2] - place[0] != group[0][2] - group[0][0]):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _read(corpus: Corpus, begin: int, end: int) -> np.ndarray:
    """The tokens that targets [begin, end) need: int64 (end - begin + 1,). Target i is token i + 1."""
    tokens = np.empty(end - begin + 1, dtype=np.int64)
    corpus.read(begin, tokens)
    return tokens
