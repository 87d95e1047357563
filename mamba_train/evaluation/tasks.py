"""How often a model answers rightly on a synthetic task, and what the papers report."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_train.config_data import SyntheticTask
from mamba_train.data.synthetic import NO_LABEL, SyntheticCorpus

TOKENS_AT_ONCE = 1 << 17

# What the papers say of the setting of our experiments, to be shown beside what was measured.
PAPER = {
    SyntheticTask.induction_heads: "100% at every length from 64 to 1,048,576 (arXiv 2312.00752, tables 2 and 11)",
    SyntheticTask.selective_copying: "99.8% at length 4,096, 56.4% with S4 as the SSM (arXiv 2312.00752, table 1)",
    SyntheticTask.mqar: "of a harder variant: Mamba-2 well above Mamba-1 with a state of the same size, "
    "and the better the larger its state (arXiv 2405.21060, section 9.1 and figure 8)",
}


@torch.no_grad()
def accuracy(
    corpus: SyntheticCorpus,
    logits: Callable[[Tensor], Tensor],
    n_samples: int,
    between: Callable[[], None] = lambda: None,
) -> float:
    """The share of labels that the most likely token is right about, over the first samples of a corpus.

    logits: of tokens (rows, length) on the CPU, as (rows, length, padded vocabulary). between: called after each batch.
    """
    right = total = 0
    rows = max(1, min(n_samples, TOKENS_AT_ONCE // corpus.length))
    for first in range(0, n_samples, rows):
        numbers = range(first, min(first + rows, n_samples))
        tokens, labels = (torch.from_numpy(part) for part in corpus.samples_at([n * corpus.length for n in numbers]))
        asked = labels != NO_LABEL
        found = logits(tokens[:, :-1])
        answers = found[asked.to(found.device)][:, : corpus.vocab_size].argmax(-1).cpu()
        right += int((answers == labels[asked]).sum())
        total += int(asked.sum())
        between()
    return right / max(1, total)


def table(task: SyntheticTask, trained_length: int, by_length: Sequence[tuple[int, float]]) -> list[str]:
    """Lines that show the accuracy at each length beside what the paper reports."""
    lines = [f"{task}: accuracy by length, trained at {trained_length:,}"]
    lines += [
        f"{length:>12,}  {value:8.2%}{'  (as in training)' if length == trained_length else ''}"
        for length, value in by_length
    ]
    return [*lines, f"the paper: {PAPER[task]}"]
