"""Which windows are validated on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba_train.config_data import SyntheticTask
from mamba_train.data.batches import Batch, WindowForm
from mamba_train.data.corpus import Corpus
from mamba_train.data.synthetic import SyntheticCorpus, symbols
from mamba_train.data.tokenizer import train_tokenizer
from mamba_train.data.validation import MIN_SEQUENCES, ValidationSet, validation_sets
from tests.data.folders import numbered, write_text_folder

MakeCorpus = Callable[..., Corpus]


def collect(batches: "list[Batch]") -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


def only_set(corpus: Corpus, length: int, n_sequences: int) -> ValidationSet:
    [found] = validation_sets({"": corpus}, WindowForm(length, with_boundaries=True), n_sequences)
    return found


@pytest.mark.parametrize("length", [15, 16])  # 15 divides the number of tokens
def test_windows_are_fixed_spread_and_do_not_overlap(make_corpus: MakeCorpus, length: int) -> None:
    corpus = make_corpus([numbered(1 + 400 * n, 10, 40) for n in range(3)])
    tokens = corpus.tokens()
    n_windows = (len(tokens) - 1) // length
    batches = list(only_set(corpus, length, 10).batches(4))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
    assert all(batch.seq_idx is not None for batch in batches)
    again = list(only_set(corpus, length, 10).batches(5))
    assert torch.equal(collect(batches), collect(again))
    place = {tuple(tokens[i * length : (i + 1) * length + 1].tolist()): i for i in range(n_windows)}
    chosen = [place[tuple(row)] for row in collect(batches).tolist()]
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1
    assert chosen[0] < n_windows / 10
    assert chosen[-1] >= n_windows * 0.85
    whole = collect(list(only_set(corpus, length, 10**6).batches(4)))
    assert np.array_equal(whole[:, 1:].flatten().numpy(), tokens[1 : n_windows * length + 1])


def test_domains_get_sequences_by_their_size_and_a_least_number(make_corpus: MakeCorpus) -> None:
    sizes = {"large": 900, "small": 90, "tiny": 5}  # windows of 10 tokens
    corpora = {name: make_corpus([[[1] * (10 * n)]]) for name, n in sizes.items()}
    sets = validation_sets(corpora, WindowForm(10, with_boundaries=False), 200)
    assert {found.label: found.n_sequences for found in sets} == {"large": 181, "small": 19, "tiny": 5}
    sets = validation_sets(corpora, WindowForm(10, with_boundaries=False), 20)
    assert {found.label: found.n_sequences for found in sets} == {"large": 19, "small": MIN_SEQUENCES, "tiny": 5}


def test_bytes_are_those_of_the_targets_that_count(tmp_path: Path) -> None:
    texts = [f"Satz {n}: über {'Bäume ' * (n % 5)}und Häuser" for n in range(40)]
    tokenizer = train_tokenizer(texts, 300)
    corpus = Corpus.open(write_text_folder(tmp_path / "x", {"validation": [("", texts)]}, tokenizer), "validation")
    n_all = sum(len(text.encode()) for text in texts)
    for mask in (False, True):
        [found] = validation_sets({"": corpus}, WindowForm(corpus.n_tokens - 1, False, mask), 1)
        # The first token of all is no target; with the mask no first token of a document is one.
        first_bytes = [len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) for text in texts]
        expected = n_all - (sum(first_bytes) if mask else first_bytes[0])
        assert found.n_bytes(tokenizer) == expected


def test_a_target_of_a_task_is_one_byte_as_in_training(tmp_path: Path) -> None:
    task = SyntheticCorpus(SyntheticTask.induction_heads, 16, 1, 32, "validation", tmp_path)
    [found] = validation_sets({"": task}, WindowForm(32, False), 4)
    n_targets = sum(int((batch.targets >= 0).sum()) for batch in found.batches(4))
    assert found.n_bytes(symbols(16)) == n_targets > 0


def test_a_domain_smaller_than_a_window_is_left_out(make_corpus: MakeCorpus) -> None:
    corpora = {"small": make_corpus([[[1] * 9]]), "large": make_corpus([[[1] * 300]])}
    form = WindowForm(10, with_boundaries=False)
    assert [found.label for found in validation_sets(corpora, form, 20)] == ["large"]
    with pytest.raises(ValueError, match=r"data\.sequence_length=10: the .* split of small has only 10 tokens"):
        validation_sets({"small": corpora["small"]}, form, 20)
    assert validation_sets({}, form, 20) == []
