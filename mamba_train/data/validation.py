"""Fixed windows of held-out text, by domain."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mamba_train.data.batches import AnyCorpus, Batch, WindowForm
from mamba_train.data.synthetic import SyntheticCorpus
from mamba_train.data.tokenizer import TextTokenizer

# However small its part of the held-out text, a domain is judged by this many sequences, if it has them.
MIN_SEQUENCES = 8


@dataclass(frozen=True)
class ValidationSet:
    """Windows of one domain: `n_sequences` of them, spread evenly over its tokens, the same each time.

    label: of the domain; "" for the only one.
    """

    label: str
    corpus: AnyCorpus
    form: WindowForm
    n_sequences: int

    def batches(self, micro_batch_size: int) -> Iterator[Batch]:
        """The windows, in batches of which the last may have fewer rows; no target is in two windows."""
        n_windows = (self.corpus.n_tokens - 1) // self.form.length
        starts = np.arange(self.n_sequences, dtype=np.int64) * n_windows // self.n_sequences * self.form.length
        for first in range(0, self.n_sequences, micro_batch_size):
            yield self.form.read([(self.corpus, start) for start in starts[first : first + micro_batch_size].tolist()])

    def n_bytes(self, tokenizer: TextTokenizer) -> int:
        """UTF-8 bytes of the text of just the targets in these windows.

        On a few windows bytes per token differ from the domain's average by a percent or so. A target of a synthetic
        task counts as one byte, as in training: what the tokenizer shows of it is no text.
        """
        total = 0
        for batch in self.batches(1):
            targets = batch.targets[0].numpy()
            targets = targets[targets >= 0]
            total += targets.size if isinstance(self.corpus, SyntheticCorpus) else tokenizer.n_bytes(targets)
        return total


def validation_sets(corpora: Mapping[str, AnyCorpus], form: WindowForm, n_sequences: int) -> list[ValidationSet]:
    """Divide about `n_sequences` windows among domains by the size of their text, with a least number for each.

    A domain smaller than a window is left out. Raises ValueError (`data.sequence_length`) if all of them are.
    """
    if corpora:
        form.check(*max(((corpus, label) for label, corpus in corpora.items()), key=lambda pair: pair[0].n_tokens))
    corpora = {label: corpus for label, corpus in corpora.items() if corpus.n_tokens > form.length}
    n_windows = {label: (corpus.n_tokens - 1) // form.length for label, corpus in corpora.items()}
    total = sum(n_windows.values())
    least = MIN_SEQUENCES if len(corpora) > 1 else 0
    chosen = {label: min(n, max(least, -(-n_sequences * n // total))) for label, n in n_windows.items()}
    return [ValidationSet(label, corpus, form, chosen[label]) for label, corpus in corpora.items()]
