"""The synthetic tasks: what is asked for is there to be found, and a sample depends on its number only."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.config_data import DataConfig, DataSource, SyntheticTask
from mamba_train.data.batches import Batch, BatchSource, WindowForm
from mamba_train.data.loader import BatchLoader
from mamba_train.data.opening import open_data
from mamba_train.data.synthetic import NO_LABEL, SyntheticCorpus, symbols
from mamba_train.data.validation import validation_sets

SIZES = {
    SyntheticTask.induction_heads: (16, 1, 32),
    SyntheticTask.selective_copying: (10, 5, 40),
    SyntheticTask.mqar: (40, 8, 48),
}

EXPECTED = {
    SyntheticTask.induction_heads: [223, -3090],
    SyntheticTask.selective_copying: [27, -3478],
    SyntheticTask.mqar: [414, -3770],
}


def corpus_of(task: SyntheticTask, split="train") -> SyntheticCorpus:
    return SyntheticCorpus(task, *SIZES[task], split, Path("/nowhere"))


@given(st.integers(0, 2**40 - 1))
def test_induction_heads_asks_for_what_followed_the_token_the_first_time(number: int) -> None:
    inputs, labels = corpus_of(SyntheticTask.induction_heads).sample(number)
    first, last = np.flatnonzero(inputs == 0)
    assert last == 31
    assert first < 30
    assert labels[-1] == inputs[first + 1] != 0
    assert (labels[:-1] == NO_LABEL).all()
    assert (inputs < 16).all()


@given(st.integers(0, 2**40 - 1))
def test_selective_copying_asks_for_the_items_in_their_order(number: int) -> None:
    inputs, labels = corpus_of(SyntheticTask.selective_copying).sample(number)
    assert (inputs[-5:] == 1).all()
    items = inputs[:-5][inputs[:-5] != 0]
    assert items.tolist() == labels[-5:].tolist()
    assert ((items >= 2) & (items < 10)).all()
    assert (labels[:-5] == NO_LABEL).all()


@given(st.integers(0, 2**40 - 1))
def test_mqar_asks_for_the_value_of_each_key(number: int) -> None:
    inputs, labels = corpus_of(SyntheticTask.mqar).sample(number)
    pairs = dict(zip(inputs[:16:2].tolist(), inputs[1:16:2].tolist(), strict=True))
    assert len(pairs) == 8
    asked = np.flatnonzero(labels != NO_LABEL)
    assert asked.min() >= 16
    assert {int(inputs[place]): int(labels[place]) for place in asked} == pairs
    assert all(1 <= key < 20 <= value < 40 for key, value in pairs.items())


def test_samples_stay_what_they_are() -> None:
    """A new version of numpy, or an edit, must not make other samples under the same name."""
    found = {task: [int(part.sum()) for part in corpus_of(task).sample(7)] for task in SyntheticTask}
    assert found == EXPECTED


def test_samples_are_spread_and_splits_have_others() -> None:
    train, test = (corpus_of(SyntheticTask.induction_heads, split) for split in ("train", "test"))
    assert train.fingerprint != test.fingerprint
    answers = [int(train.sample(number)[1][-1]) for number in range(3000)]
    assert np.bincount(answers, minlength=16)[1:].min() > 120
    places = [int(np.flatnonzero(train.sample(number)[0] == 0)[0]) for number in range(3000)]
    assert set(places) == set(range(30))
    assert any(train.sample(n)[0].tolist() != test.sample(n)[0].tolist() for n in range(3))


def config_of(tmp_path: Path) -> DataConfig:
    vocab_size, items, length = SIZES[SyntheticTask.mqar]
    return DataConfig(
        name="mqar",
        source=DataSource.synthetic,
        task=SyntheticTask.mqar,
        vocab_size=vocab_size,
        task_items=items,
        sequence_length=length,
        cache_dir=str(tmp_path),
    )


def test_ranks_workers_and_restarts_make_no_difference(tmp_path: Path) -> None:
    data = open_data(config_of(tmp_path), print)
    source = BatchSource(data.corpora, 8, 3, WindowForm(48, False), data.stages)
    whole = source.batch(16, range(8))
    assert whole.n_targets == 64
    assert not np.array_equal(source.batch(16, range(8)).targets, source.batch(24, range(8)).targets)
    for ranks in (1, 2, 4):
        rows = []
        for rank in range(ranks):
            loader = BatchLoader(source, rank, ranks, 2, workers=rank % 2)
            rows += loader.step(16)
            loader.close()
        assert np.array_equal(np.concatenate([batch.targets for batch in rows]), whole.targets)
        assert np.array_equal(np.concatenate([batch.inputs for batch in rows]), whole.inputs)


def test_labels_travel_with_the_batch(tmp_path: Path) -> None:
    data = open_data(config_of(tmp_path), print)
    (held_out,) = validation_sets(data.validation, WindowForm(48, False), 6)
    batches = list(held_out.batches(4))
    assert [len(batch.tokens) for batch in batches] == [4, 2]
    again: Batch = pickle.loads(pickle.dumps(batches[0]))
    assert np.array_equal(again.targets, batches[0].targets)
    assert again.to("cpu").n_targets == batches[0].n_targets == 32
    assert held_out.n_bytes(symbols(40)) > 0


@pytest.mark.parametrize("vocab_size", [3, 16, 8192])
def test_the_tokenizer_shows_each_token_as_a_character(vocab_size: int) -> None:
    tokenizer = symbols(vocab_size)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (vocab_size, 0)
    text = tokenizer.decode([1, vocab_size - 1])
    assert len(text) == 2
