"""From tokens to batches, in an order that is a pure function of config, seed and position.

A window is `sequence_length + 1` tokens; windows lie `sequence_length` apart, so that each token but
the first is a target. The position of the whole pipeline is the number of samples consumed: which rank,
worker or micro-batch asks for a sample makes no difference to what it gets (contract C3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mamba_train.data.corpus import Corpus
from mamba_train.data.mixture import Mixture, Stage
from mamba_train.data.order import ORDER_VERSION, epoch_key, permute_each
from mamba_train.data.synthetic import SyntheticCorpus

AnyCorpus: TypeAlias = Corpus | SyntheticCorpus

IGNORE_INDEX = -100  # a target that counts for nothing, as the loss has it

# Samples whose windows are computed together: for one or two alone numpy takes almost as long as for these.
GROUP_SAMPLES = 64

# What feeds a run without a mixture: the windows of all shards, by the name of no source.
EVERYTHING = ((0, {"": 1.0}),)


@dataclass(frozen=True)
class Batch:
    """Windows of tokens.

    tokens: int64 (rows, length + 1). seq_idx: int32 (rows, length + 1), the number of each token's
    document counted from 0 in each row, or None where boundaries are not wanted. The end-of-document
    token belongs to the document that it ends. unpredictable_after: the end-of-document id, when the
    token behind it is to be no target; None: all tokens but the first are targets. labels: of a synthetic task, int64
    (rows, length), in the place of the next tokens; IGNORE_INDEX where there are none. lengths: int64 (rows,), how
    many tokens of each row are text, the others being no targets; None: all are.
    """

    tokens: torch.Tensor
    seq_idx: torch.Tensor | None
    unpredictable_after: int | None = None
    labels: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @property
    def inputs(self) -> torch.Tensor:
        """Tokens that the model reads, (rows, length)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """Tokens that it has to predict, (rows, length); IGNORE_INDEX where there is nothing to predict."""
        if self.labels is not None:
            return self.labels
        targets = self.tokens[:, 1:]
        if self.unpredictable_after is not None:
            targets = targets.masked_fill(self.inputs == self.unpredictable_after, IGNORE_INDEX)
        if self.lengths is not None:
            places = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
            targets = targets.masked_fill(places >= self.lengths[:, None], IGNORE_INDEX)
        return targets

    @property
    def n_targets(self) -> int:
        """How many tokens there are to predict."""
        if self.labels is not None or self.lengths is not None:
            return int((self.targets != IGNORE_INDEX).sum())
        if self.unpredictable_after is None:
            return self.inputs.numel()
        return int((self.inputs != self.unpredictable_after).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU can copy from while it computes (the DataLoader calls this)."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        seq_idx, labels, lengths = (
            None if part is None else change(part) for part in (self.seq_idx, self.labels, self.lengths)
        )
        return Batch(change(self.tokens), seq_idx, self.unpredictable_after, labels, lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes as few plain bytes: a tensor would go by shared memory, of which containers have little and
        # which costs the receiver a millisecond to open; and what fits into a pipe is there when it is asked for.
        tokens = self.tokens.numpy()
        narrow = tokens.astype(np.uint16 if tokens.size and tokens.max() < 2**16 else np.int32)
        starts = None if self.seq_idx is None else np.packbits(np.diff(self.seq_idx.numpy(), axis=-1, prepend=0) > 0)
        labels = None if self.labels is None else self.labels.numpy().astype(np.int32)
        lengths = None if self.lengths is None else self.lengths.tolist()
        return _unpack, (narrow, starts, self.unpredictable_after, labels, lengths)


def _unpack(
    narrow: np.ndarray, starts: np.ndarray | None, unpredictable_after: int | None,
    narrow_labels: np.ndarray | None, lengths: list[int] | None,
) -> Batch:  # fmt: skip
    tokens, seq_idx = torch.from_numpy(narrow.astype(np.int64)), None
    if starts is not None:
        begins = np.unpackbits(starts, count=narrow.size).reshape(narrow.shape)
        seq_idx = torch.from_numpy(np.cumsum(begins, axis=-1, dtype=np.int32))
    labels = None if narrow_labels is None else torch.from_numpy(narrow_labels.astype(np.int64))
    return Batch(tokens, seq_idx, unpredictable_after, labels, None if lengths is None else torch.tensor(lengths))


@dataclass(frozen=True)
class WindowForm:
    """How windows become batches: their length, and what documents in them mean (see `DataConfig`)."""

    length: int
    with_boundaries: bool
    mask_loss: bool = False

    def read(self, places: Sequence[tuple[AnyCorpus, int]]) -> Batch:
        """The windows that begin at these tokens of corpora of one tokenizer. Raises ReadError."""
        if places and isinstance(task := places[0][0], SyntheticCorpus):
            samples, labels = task.samples_at([start for _, start in places])
            return Batch(torch.from_numpy(samples), None, labels=torch.from_numpy(labels))
        tokens = np.empty((len(places), self.length + 1), dtype=np.int64)
        for row, (corpus, start) in zip(tokens, places, strict=True):
            assert isinstance(corpus, Corpus), "a task is mixed with nothing else"
            corpus.read(start, row)
        eos_id = places[0][0].eos_id if places else None
        boundaries = self.with_boundaries and eos_id is not None
        seq_idx = torch.from_numpy(document_numbers(tokens, eos_id)) if boundaries else None
        return Batch(torch.from_numpy(tokens), seq_idx, eos_id if self.mask_loss else None)

    def check(self, corpus: AnyCorpus, name: str) -> None:
        """Raise ValueError (`data.sequence_length`) if the corpus is smaller than one window."""
        if self.length < 1:
            raise ValueError(f"data.sequence_length={self.length}: expected at least 1")
        if corpus.n_tokens < self.length + 1:
            what = f"{corpus.split} split of {name}" if name else f"{corpus.split} split"
            raise ValueError(
                f"data.sequence_length={self.length}: the {what} has only {corpus.n_tokens} tokens, "
                f"fewer than one window of {self.length + 1}; use a shorter sequence or more text"
            )


def document_numbers(tokens: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Number of the document of each token, int32, counted from 0 along the last axis."""
    ends = tokens == eos_id
    numbers: np.ndarray = np.cumsum(ends, axis=-1, dtype=np.int32) - ends
    return numbers


class BatchSource:
    """The endless stream of training samples: each source gives epoch after epoch of its windows, permuted anew.

    Attributes: `names` of the sources, `n_windows` in an epoch of each (int64), the `mixture` of them.
    """

    order = ORDER_VERSION
    may_change = True  # a position means something in other tokens, too

    def __init__(
        self,
        corpora: Mapping[str, AnyCorpus],
        global_batch_size: int,
        seed: int,
        form: WindowForm,
        stages: Sequence[tuple[int, Mapping[str, float]]] = EVERYTHING,
    ) -> None:
        """corpora: by the names that stages use; stages: (from_step, weights), the first from step 0.

        Raises ValueError (`data.sequence_length`) if a corpus is smaller than one window.
        """
        for name, corpus in corpora.items():
            form.check(corpus, name)
        self.form = form
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.corpora = dict(corpora)
        self.changes: list[dict[str, object]] = []  # see `mamba_train.data.position`
        self.set_stages([Stage(step, step * global_batch_size, weights) for step, weights in stages])

    def set_stages(self, stages: Sequence[Stage]) -> None:
        """Feed by these stages: a resumed run may know that some began at other samples."""
        self.mixture = Mixture(stages, self.seed)
        self.names = self.mixture.names
        self._by_number = [self.corpora[name] for name in self.names]
        self._group = -1  # the group of samples that was computed last, and what came out
        self._windows_of_group: list[list[int]] = []
        # Rounded up: the last window of an epoch is moved back to end with the corpus, so it repeats
        # some targets of the one before it, and no token is left out.
        self.n_windows = np.array([-(-(corpus.n_tokens - 1) // self.form.length) for corpus in self._by_number])

    def fingerprint_of(self, name: str) -> str:
        """SHA-256 of the tokens of a source, their order and tokenizer."""
        return self.corpora[name].fingerprint

    def is_same(self, name: str, fingerprint: str) -> bool:
        """Whether a source is what a checkpoint knows by this (beginning of a) fingerprint."""
        return self.fingerprint_of(name).startswith(fingerprint)

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the number of samples: nothing."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """There is nothing to load."""

    def windows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source (an index into `names`) and the window in it of each sample number, all int64 (n,)."""
        sources, ordinals = self.mixture.locate(np.asarray(samples, dtype=np.int64))
        n_windows = self.n_windows[sources]
        epochs, places = np.divmod(ordinals, n_windows)
        names_and_epochs = zip(sources.tolist(), epochs.tolist(), strict=True)
        keys = [epoch_key(self.seed, epoch, self.names[number]) for number, epoch in names_and_epochs]
        return sources, permute_each(places, n_windows.tolist(), keys) if keys else places

    def places(self, samples: np.ndarray) -> list[tuple[AnyCorpus, int]]:
        """The corpus of each sample and the token in it with which its window begins."""
        found = []
        for sample in np.asarray(samples, dtype=np.int64).tolist():
            group, place = divmod(sample, GROUP_SAMPLES)
            if group != self._group:
                members = np.arange(group * GROUP_SAMPLES, (group + 1) * GROUP_SAMPLES)
                self._group, self._windows_of_group = group, [array.tolist() for array in self.windows(members)]
            source, window = (values[place] for values in self._windows_of_group)
            corpus = self._by_number[source]
            found.append((corpus, min(window * self.form.length, corpus.n_tokens - 1 - self.form.length)))
        return found

    def batch(self, first_sample: int, rows: slice | range) -> Batch:
        """Rows of the global batch that begins at sample `first_sample`: samples first_sample + rows.

        A pure function: it depends on its arguments, the tokens, the seed, the stages and the form only.
        Raises ValueError if `rows` leaves the global batch, ReadError if tokens cannot be read.
        """
        if isinstance(rows, slice):
            rows = range(*rows.indices(self.global_batch_size))
        if len(rows) and not 0 <= min(rows) <= max(rows) < self.global_batch_size:
            raise ValueError(f"{rows} is not inside a global batch of {self.global_batch_size} rows")
        return self.form.read(self.places(first_sample + np.array(rows, dtype=np.int64)))

    def epochs(self, samples: int) -> dict[str, float]:
        """How many times each source has been read when so many samples have been consumed."""
        read = self.mixture.consumed(samples) / self.n_windows
        return dict(zip(self.names, read.tolist(), strict=True))

    def corpus_at(self, name: str, sample: int) -> AnyCorpus:
        """The tokens of a source from which those around a sample are."""
        return self.corpora[name]

    def bytes_per_target(self, sample: int) -> float:
        """UTF-8 bytes of text per target, on average over the sources of the stage of a sample."""
        shares = self.mixture.stages[self.mixture.stage_at(sample)].shares
        n_bytes = n_targets = 0.0
        for name, share in shares.items():
            corpus = self.corpus_at(name, sample)
            n_tokens, tokens_of_bytes = corpus.n_tokens, corpus.n_tokens - corpus.n_documents
            masked = corpus.n_documents if self.form.mask_loss else 0
            # A document's first token, which may be masked, is taken to be as long as any other.
            n_bytes += share * corpus.n_bytes / n_tokens * (1 - masked / max(1, tokens_of_bytes))
            n_targets += share * (n_tokens - masked) / n_tokens
        return n_bytes / n_targets if n_targets else 1.0
