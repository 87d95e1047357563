"""From a corpus to batches, in an order that is a pure function of the seed and the position.

A window is `sequence_length + 1` tokens; windows lie `sequence_length` apart, so that each token but
the first is a target. The state of the whole pipeline is the number of samples consumed: which rank,
worker or micro-batch asks for a sample makes no difference to what it gets (contract C3).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mamba_train.data.corpus import Corpus
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.data.order import ORDER_VERSION, epoch_key, permute
from mamba_train.data.tokenizer import load_tokenizer

__all__ = ["Batch", "BatchSource", "Corpus", "validation_batches", "validation_bytes_per_token"]


@dataclass(frozen=True)
class Batch:
    """Windows of tokens.

    tokens: int64 (rows, length + 1). seq_idx: int32 (rows, length + 1), the number of each token's
    document counted from 0 in each row, or None where boundaries are not wanted. The end-of-document
    token belongs to the document that it ends.
    """

    tokens: torch.Tensor
    seq_idx: torch.Tensor | None

    @property
    def inputs(self) -> torch.Tensor:
        """Tokens that the model reads, (rows, length)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """Tokens that it has to predict, (rows, length)."""
        return self.tokens[:, 1:]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        seq_idx = None if self.seq_idx is None else self.seq_idx.to(device, non_blocking=True)
        return Batch(self.tokens.to(device, non_blocking=True), seq_idx)


def document_numbers(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Number of the document of each token, int32, counted from 0 along the last axis."""
    ends = tokens == eos_id
    numbers: np.ndarray = np.cumsum(ends, axis=-1, dtype=np.int32) - ends
    return numbers


def _read_windows(corpus: Corpus, starts: np.ndarray, length: int, with_boundaries: bool) -> Batch:
    tokens = np.empty((len(starts), length + 1), dtype=np.int64)
    for row, start in zip(tokens, starts.tolist(), strict=True):
        corpus.read(start, row)
    seq_idx = torch.from_numpy(document_numbers(tokens, corpus.eos_id)) if with_boundaries else None
    return Batch(torch.from_numpy(tokens), seq_idx)


def _check_length(corpus: Corpus, sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length={sequence_length}: expected at least 1")
    if corpus.n_tokens < sequence_length + 1:
        raise ValueError(
            f"data.sequence_length={sequence_length}: the {corpus.split} split has only {corpus.n_tokens} "
            f"tokens, fewer than one window of {sequence_length + 1}; use a shorter sequence or more text"
        )


class BatchSource:
    """The endless stream of training samples: epoch after epoch, each a fresh permutation of the windows."""

    def __init__(
        self, corpus: Corpus, sequence_length: int, global_batch_size: int, seed: int, with_boundaries: bool
    ) -> None:
        """Raises ValueError (`data.sequence_length`) if the corpus is smaller than one window."""
        _check_length(corpus, sequence_length)
        self._corpus = corpus
        self._length = sequence_length
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._with_boundaries = with_boundaries
        # Rounded up: the last window of an epoch is moved back to end with the corpus, so it repeats
        # some targets of the one before it, and no token is left out.
        self.n_windows = -(-(corpus.n_tokens - 1) // sequence_length)

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """The window of each sample number, both int64 (n,)."""
        epochs, positions = np.divmod(np.asarray(samples, dtype=np.int64), self.n_windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            windows[chosen] = permute(positions[chosen], self.n_windows, epoch_key(self._seed, epoch))
        return windows

    def batch(self, first_sample: int, rows: slice | range) -> Batch:
        """Rows of the global batch that begins at sample `first_sample`: samples first_sample + rows.

        A pure function: it depends on its arguments, the corpus, the seed and the length only. Raises
        ValueError if `rows` leaves the global batch.
        """
        if isinstance(rows, slice):
            rows = range(*rows.indices(self._global_batch_size))
        if len(rows) and not 0 <= min(rows) <= max(rows) < self._global_batch_size:
            raise ValueError(f"{rows} is not inside a global batch of {self._global_batch_size} rows")
        windows = self.windows(first_sample + np.array(rows, dtype=np.int64))
        starts = np.minimum(windows * self._length, self._corpus.n_tokens - 1 - self._length)
        return _read_windows(self._corpus, starts, self._length, self._with_boundaries)

    def state(self, samples_consumed: int) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what gives it its meaning. JSON values."""
        return {
            "samples": samples_consumed,
            "seed": self._seed,
            "sequence_length": self._length,
            "fingerprint": self._corpus.fingerprint,
            "order": ORDER_VERSION,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a saved state's position means the same samples here as there."""
        mine = self.state(0)
        missing = [key for key in mine if key not in state]
        if missing:
            raise ValueError(f"the data state of the checkpoint has no {', '.join(missing)}: it cannot be continued")
        samples = state["samples"]
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
            raise ValueError(f"the data state of the checkpoint has samples={samples!r}: expected a count")
        remedy = "or start a new run with another run_dir"
        reasons = {
            "seed": "seed={mine}: the checkpoint was trained with seed={saved}; set seed={saved}, " + remedy,
            "sequence_length": "data.sequence_length={mine}: the checkpoint was trained with {saved}; "
            "set data.sequence_length={saved}, " + remedy,
            "fingerprint": "the text or tokenizer (data.source, data.path, data.tokenizer, data.vocab_size, "
            "data.validation_fraction) is not the checkpoint's (fingerprint {mine:.12}, saved {saved:.12}); "
            "restore it, " + remedy,
            "order": "this version orders samples by {mine}, the checkpoint's by {saved}; "
            "use the version that wrote it, " + remedy,
        }
        for key, reason in reasons.items():
            if state[key] != mine[key]:
                raise ValueError(reason.format(mine=mine[key], saved=state[key]))


def validation_batches(
    corpus: Corpus, sequence_length: int, micro_batch_size: int, n_sequences: int, with_boundaries: bool
) -> Iterator[Batch]:
    """The same `n_sequences` windows each time, spread evenly over the corpus (all, if it has fewer).

    The windows do not overlap: each target counts once. The last batch may have fewer rows.
    Raises ValueError (`data.sequence_length`) if the corpus is smaller than one window.
    """
    _check_length(corpus, sequence_length)
    n_windows = (corpus.n_tokens - 1) // sequence_length
    n = min(n_sequences, n_windows)
    starts = np.arange(n, dtype=np.int64) * n_windows // max(1, n) * sequence_length
    return (
        _read_windows(corpus, starts[first : first + micro_batch_size], sequence_length, with_boundaries)
        for first in range(0, n, micro_batch_size)
    )


def validation_bytes_per_token(corpus: Corpus, sequence_length: int, n_sequences: int) -> float:
    """UTF-8 bytes of text per target token in just the windows that `validation_batches` gives.

    On a few windows it differs from the corpus's average by a percent or so, and bits per byte with it.
    """
    tokenizer = load_tokenizer(corpus.folder / TOKENIZER_NAME)
    n_bytes = n_tokens = 0
    for batch in validation_batches(corpus, sequence_length, 1, n_sequences, with_boundaries=False):
        targets = batch.targets[0].numpy()
        n_bytes += tokenizer.n_bytes(targets)
        n_tokens += len(targets)
    return n_bytes / max(1, n_tokens)
