"""A bigram model of the tokens: the baseline that a trained model must beat.

Interpolated Kneser-Ney (Chen and Goodman 1999, section 2.7): an absolute discount D is taken from
every pair that was seen, and the mass it frees goes to a unigram distribution that counts in how
many contexts a token was seen:

    p(w | v) = max(c(v w) - D, 0) / c(v) + D t(v) / c(v) * p1(w),   D = n1 / (n1 + 2 n2)

with t(v) the number of different followers of v, and n1, n2 the number of pairs seen once and twice.
p1 is smoothed by adding one, so no token of the vocabulary is impossible. It is the strongest of the
simple bigram models, which keeps the comparison honest.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK_TOKENS = 1 << 22

IntArray = NDArray[np.integer]


@dataclass(frozen=True)
class BigramScore:
    """What a bigram model trained on `n_train_tokens` tokens scores on the validation tokens."""

    nats_per_token: float
    bits_per_byte: float
    n_train_tokens: int


class BigramModel:
    """Kneser-Ney bigram model of integer tokens in [0, vocab_size)."""

    def __init__(self, tokens: IntArray, vocab_size: int) -> None:
        """Count the adjacent pairs of `tokens` (1-D, at least two; a memory map is read in chunks).

        Raises ValueError for fewer than two tokens and for a token outside the vocabulary.
        """
        if len(tokens) < 2:
            raise ValueError(f"a bigram model needs at least 2 training tokens, got {len(tokens)}")
        self.vocab_size = vocab_size
        self._pairs, self._counts = _count_pairs(tokens, vocab_size)
        previous, following = np.divmod(self._pairs, vocab_size)
        n_once, n_twice = int((self._counts == 1).sum()), int((self._counts == 2).sum())
        # Without a pair seen once there is nothing to estimate D from; it must stay below 1.
        self._discount = n_once / (n_once + 2 * n_twice) if n_once and n_twice else 0.5
        self._context_counts = np.bincount(previous, weights=self._counts, minlength=vocab_size)
        self._n_followers = np.bincount(previous, minlength=vocab_size)
        n_contexts = np.bincount(following, minlength=vocab_size)
        self._unigram = (n_contexts + 1.0) / (len(self._pairs) + vocab_size)

    def probability(self, previous: IntArray, following: IntArray) -> NDArray[np.float64]:
        """Probability of each token `following[i]` after `previous[i]` (1-D, equal lengths)."""
        wanted = previous.astype(np.int64) * self.vocab_size + following
        place = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        count = np.where(self._pairs[place] == wanted, self._counts[place], 0)
        context = self._context_counts[previous]
        seen = np.maximum(context, 1.0)
        backoff = np.where(context > 0, self._discount * self._n_followers[previous] / seen, 1.0)
        return np.maximum(count - self._discount, 0.0) / seen + backoff * self._unigram[following]

    def nats_per_token(self, tokens: IntArray) -> float:
        """Mean negative log-likelihood of tokens[1:], each given the one before it."""
        if len(tokens) < 2:
            raise ValueError(f"a bigram model needs at least 2 validation tokens, got {len(tokens)}")
        total = 0.0
        for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
            chunk = _checked(tokens[start : start + CHUNK_TOKENS + 1], self.vocab_size)
            total -= float(np.log(self.probability(chunk[:-1], chunk[1:])).sum())
        return total / (len(tokens) - 1)


def bigram_score(train_tokens: IntArray, windows: IntArray, vocab_size: int, bytes_per_token: float) -> BigramScore:
    """Train a bigram model and score it on validation windows.

    windows: (rows, length + 1); all tokens of a row but the first are targets. bytes_per_token: of these
    targets, which turns nats per token into bits per byte.
    """
    model = BigramModel(train_tokens, vocab_size)
    nats = float(np.mean([model.nats_per_token(window) for window in windows]))
    return BigramScore(nats, nats / math.log(2) / bytes_per_token, len(train_tokens))


def _count_pairs(tokens: IntArray, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different pairs as previous * vocab_size + following, sorted, and their counts."""
    pairs = np.empty(0, dtype=np.int64)
    counts = np.empty(0, dtype=np.int64)
    for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
        chunk = _checked(tokens[start : start + CHUNK_TOKENS + 1], vocab_size)
        new_pairs, new_counts = np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)
        merged, place = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        weights = np.concatenate([counts, new_counts])
        pairs, counts = merged, np.bincount(place, weights=weights).astype(np.int64)
    return pairs, counts


def _checked(chunk: IntArray, vocab_size: int) -> NDArray[np.int64]:
    tokens: NDArray[np.int64] = np.asarray(chunk).astype(np.int64)
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(f"bigram: token {token} is outside the vocabulary of {vocab_size}")
    return tokens
