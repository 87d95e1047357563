"""Loss by position and at context lengths beyond those of the training: what state-space models are chosen for."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from mamba_train.data.corpus import Corpus
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.evaluation.length_axis import INK, draw_length_axis
from mamba_train.evaluation.perplexity import Protocol, Score, TokenLosses, Windows, score

TOKENS_AT_ONCE = 65536  # fewer windows go together the longer they are


@dataclass(frozen=True)
class LengthCurve:
    """Packed scores of the same targets at several context lengths, by length."""

    scores: dict[int, Score]

    @property
    def longest(self) -> int:
        return max(self.scores)

    def by_position(self) -> list[tuple[int, int, float]]:
        """(first, last, mean nats per token) of positions [1, 2, 3-4, 5-8, ...] in windows of the longest length."""
        losses = self.scores[self.longest].by_position
        edges = [0, *(2**power for power in range(64) if 2**power < len(losses)), len(losses)]
        return [
            (first + 1, last, float(np.nanmean(losses[first:last])))
            for first, last in itertools.pairwise(edges)
            if last > first and not np.isnan(losses[first:last]).all()
        ]


def score_lengths(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    losses: TokenLosses,
    lengths: Sequence[int],
    max_tokens: int | None,
    reset_at_documents: bool = False,
    batch_size: int | None = None,
) -> LengthCurve:
    """Score the same tokens with windows of each of the lengths.

    batch_size: windows at once; None: as many as have TOKENS_AT_ONCE tokens, and at least one.
    The targets are as many as whole windows of the longest length take. Raises ValueError when the corpus has not one.
    """
    longest = max(lengths)
    available = corpus.n_tokens - 1 if max_tokens is None else min(corpus.n_tokens - 1, max_tokens)
    n_targets = available // longest * longest
    if not n_targets:
        raise ValueError(
            f"--lengths {longest}: there are only {available:,} tokens to predict; give more text or shorter lengths"
        )
    scores = {}
    for length in sorted(set(lengths)):
        windows = Windows(
            Protocol.packed,
            length,
            reset_at_documents=reset_at_documents,
            max_tokens=n_targets,
            batch_size=batch_size or max(1, TOKENS_AT_ONCE // length),
        )
        scores[length] = score(corpus, tokenizer, losses, windows)
    return LengthCurve(scores)


def length_figure(curve: LengthCurve, trained_length: int | None, title: str) -> Figure:
    """Bits per byte over the context length, and nats per token over the position."""
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    by_length, by_position = figure.subplots(1, 2)
    lengths = sorted(curve.scores)
    by_length.plot(lengths, [curve.scores[length].bits_per_byte for length in lengths], color=INK, marker="o")
    by_length.set_xlabel("context length (tokens)")
    by_length.set_ylabel("bits per byte")
    spans = curve.by_position()
    centres = [(first * last) ** 0.5 for first, last, _ in spans]
    by_position.plot(centres, [loss for _, _, loss in spans], color=INK, marker="o")
    by_position.set_xlabel(f"position in a window of {curve.longest:,} tokens")
    by_position.set_ylabel("nats per token")
    for axis in (by_length, by_position):
        draw_length_axis(axis, trained_length, height=0.98)
    figure.suptitle(title.replace("$", r"\$"), fontsize=12)
    return figure
