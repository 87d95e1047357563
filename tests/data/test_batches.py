import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data.batches import Batch, BatchSource, Corpus, document_numbers, validation_batches

MakeCorpus = Callable[..., Corpus]


def numbered_shards(n_shards: int, documents: int, length: int) -> list[list[list[int]]]:
    """Documents in which each token is a different number."""
    ids = iter(range(1, 60_000))
    return [[[next(ids) for _ in range(length)] for _ in range(documents)] for _ in range(n_shards)]


def test_corpus_is_the_concatenation_of_its_shards(make_corpus: MakeCorpus) -> None:
    shards = [[[1, 2], [3]], [], [[4], [5, 6, 7]], [[8]]]
    corpus = make_corpus(shards)
    expected = [1, 2, 0, 3, 0, 4, 0, 5, 6, 7, 0, 8, 0]
    assert corpus.tokens().tolist() == expected
    assert corpus.tokens(4).tolist() == expected[:4]
    assert corpus.tokens(1000).tolist() == expected
    assert (corpus.n_documents, corpus.n_tokens, corpus.n_bytes) == (5, 13, 24)
    assert corpus.bytes_per_token == pytest.approx(24 / 13)
    for start in range(13):
        for end in range(start + 1, 14):
            out = np.empty(end - start, dtype=np.int64)
            corpus.read(start, out)
            assert out.tolist() == expected[start:end]


@pytest.mark.parametrize("length", [1, 7, 10, 11, 64])
def test_an_epoch_has_each_window_once_and_loses_no_token(make_corpus: MakeCorpus, length: int) -> None:
    corpus = make_corpus(numbered_shards(3, 5, 13))
    tokens = corpus.tokens()
    source = BatchSource(corpus, length, 1, seed=0, with_boundaries=False)
    for epoch in range(3):
        first = epoch * source.n_windows
        windows = source.windows(first + np.arange(source.n_windows))
        assert sorted(windows.tolist()) == list(range(source.n_windows))
        targets: Counter[int] = Counter()
        inputs: set[int] = set()
        for sample in range(first, first + source.n_windows):
            batch = source.batch(sample, slice(None))
            targets.update(batch.targets.flatten().tolist())
            inputs.update(batch.inputs.flatten().tolist())
        assert set(targets) | inputs == set(tokens.tolist())
        repeated = source.n_windows * length - (len(tokens) - 1)
        assert 0 <= repeated < length
        assert sum(targets.values()) - repeated == len(tokens) - 1


def test_windows_are_stretches_of_the_corpus_that_cross_shards(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(4, 2, 9))
    tokens = corpus.tokens()
    source = BatchSource(corpus, 16, 8, seed=5, with_boundaries=False)
    windows = source.windows(np.arange(3 * source.n_windows))
    rows = torch.cat([source.batch(s, slice(0, 1)).tokens for s in range(3 * source.n_windows)])
    for window, row in zip(windows.tolist(), rows.numpy(), strict=True):
        start = min(window * 16, len(tokens) - 17)
        assert np.array_equal(row, tokens[start : start + 17])


def test_epochs_and_seeds_differ(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(1, 20, 50))
    source = BatchSource(corpus, 16, 1, seed=0, with_boundaries=False)
    n = source.n_windows
    orders = [source.windows(epoch * n + np.arange(n)).tolist() for epoch in range(3)]
    orders.append(BatchSource(corpus, 16, 1, seed=1, with_boundaries=False).windows(np.arange(n)).tolist())
    assert len({tuple(order) for order in orders}) == 4


def global_step(
    source: BatchSource, step: int, batch_size: int, ranks: int, accumulation: int, swap: bool = False
) -> torch.Tensor:
    """The tokens of a step as `ranks` ranks would gather them, each from micro-batches of its own rows."""
    per_rank = batch_size // ranks
    gathered = []
    for rank in range(ranks):
        reads = ranks - 1 - rank if swap and rank in (0, ranks - 1) else rank
        rows = range(reads * per_rank, (reads + 1) * per_rank)
        size = per_rank // accumulation
        for first in range(0, per_rank, size):
            gathered.append(source.batch(step * batch_size, rows[first : first + size]).tokens)
    return torch.cat(gathered)


def test_a_global_step_does_not_depend_on_ranks_or_accumulation(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(3, 20, 40))
    batch_size = 12

    def new_source() -> BatchSource:
        return BatchSource(corpus, 16, batch_size, seed=9, with_boundaries=True)

    reference = [new_source().batch(step * batch_size, slice(None)).tokens for step in range(40)]
    assert len(reference) * batch_size > 2 * new_source().n_windows  # beyond two epochs
    for ranks, accumulation in [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3)]:
        # A restart at each step, in any order of steps: nothing is remembered between calls.
        for step in [39, 0, 1, 20, 12, 13]:
            found = global_step(new_source(), step, batch_size, ranks, accumulation)
            assert torch.equal(found, reference[step])
    swapped = global_step(new_source(), 3, batch_size, 2, 1, swap=True)
    assert not torch.equal(swapped, reference[3])


def test_rows_may_be_ranges_with_a_stride_and_must_stay_inside(make_corpus: MakeCorpus) -> None:
    source = BatchSource(make_corpus(numbered_shards(1, 10, 30)), 8, 6, seed=0, with_boundaries=False)
    whole = source.batch(12, slice(None)).tokens
    assert torch.equal(source.batch(12, range(1, 6, 2)).tokens, whole[1::2])
    assert torch.equal(source.batch(12, slice(4, None)).tokens, whole[4:])
    assert source.batch(12, range(0)).tokens.shape == (0, 9)
    for rows in (range(6, 7), range(-1, 2)):
        with pytest.raises(ValueError, match="global batch of 6"):
            source.batch(0, rows)


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=5))
def test_document_numbers_equal_a_loop(rows: list[list[int]]) -> None:
    found = document_numbers(np.array(rows), eos_id=0)
    assert found.dtype == np.int32
    for row, numbers in zip(rows, found.tolist(), strict=True):
        number = 0
        for token, assigned in zip(row, numbers, strict=True):
            assert assigned == number
            number += token == 0


def test_document_numbers_at_the_edges() -> None:
    rows = np.array([[5, 0, 6, 7], [0, 6, 7, 0], [0, 0, 0, 5], [5, 6, 7, 8]])
    expected = [[0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert document_numbers(rows, eos_id=0).tolist() == expected


def test_batch_has_the_promised_types(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(2, 4, 5))
    batch = BatchSource(corpus, 8, 3, seed=0, with_boundaries=True).batch(0, slice(None)).to("cpu")
    assert batch.seq_idx is not None
    assert (batch.tokens.dtype, batch.seq_idx.dtype) == (torch.int64, torch.int32)
    assert batch.tokens.shape == batch.seq_idx.shape == (3, 9)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.seq_idx.max() >= 1
    without = BatchSource(corpus, 8, 3, seed=0, with_boundaries=False).batch(0, slice(None))
    assert without.seq_idx is None
    assert torch.equal(without.tokens, batch.tokens)
    assert without.to("cpu").seq_idx is None


def test_a_corpus_of_one_window_works_and_a_smaller_one_is_refused(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[[1, 2, 3, 4]]])
    source = BatchSource(corpus, 4, 2, seed=0, with_boundaries=True)
    assert source.batch(7, slice(None)).tokens.tolist() == [[1, 2, 3, 4, 0]] * 2
    with pytest.raises(ValueError, match=r"data\.sequence_length=5: the train split has only 5 tokens"):
        BatchSource(corpus, 5, 2, seed=0, with_boundaries=True)
    with pytest.raises(ValueError, match=r"data\.sequence_length=5"):
        validation_batches(corpus, 5, 2, 1, with_boundaries=True)
    with pytest.raises(ValueError, match=r"data\.sequence_length=0"):
        BatchSource(corpus, 0, 2, seed=0, with_boundaries=True)


def test_state_is_small_json_and_does_not_grow(make_corpus: MakeCorpus) -> None:
    source = BatchSource(make_corpus(numbered_shards(1, 10, 30)), 8, 6, seed=3, with_boundaries=False)
    state = json.loads(json.dumps(source.state(10**12)))
    assert state["samples"] == 10**12
    assert len(json.dumps(state)) < 300
    source.check_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"seed=3: the checkpoint was trained with seed=4; set seed=4"),
        ({"sequence_length": 9}, r"data\.sequence_length=8: .* with 9; set data\.sequence_length=9"),
        ({"fingerprint": "f" * 64}, r"data\.path.* saved ffffffffffff\)"),
        ({"order": "older"}, "older"),
        ({"samples": -1}, "samples=-1"),
        ({"samples": "7"}, "samples='7'"),
    ],
)
def test_a_foreign_state_is_refused(make_corpus: MakeCorpus, change: dict[str, object], message: str) -> None:
    source = BatchSource(make_corpus(numbered_shards(1, 10, 30)), 8, 6, seed=3, with_boundaries=False)
    with pytest.raises(ValueError, match=message) as caught:
        source.check_state({**source.state(5), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["samples", "seed", "sequence_length", "fingerprint", "order"])
def test_a_state_with_a_part_missing_is_refused(make_corpus: MakeCorpus, key: str) -> None:
    source = BatchSource(make_corpus(numbered_shards(1, 10, 30)), 8, 6, seed=3, with_boundaries=False)
    state = source.state(5)
    del state[key]
    with pytest.raises(ValueError, match=f"has no {key}"):
        source.check_state(state)


def test_the_fingerprint_depends_on_tokens_and_their_order(make_corpus: MakeCorpus) -> None:
    shards = [[[1, 2], [3]], [[4, 5]]]
    first = make_corpus(shards).fingerprint
    assert make_corpus(shards).fingerprint == first
    assert make_corpus(shards[::-1]).fingerprint != first
    assert make_corpus([[[1, 2], [3]], [[4, 6]]]).fingerprint != first


def collect(batches: "list[Batch]") -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


@pytest.mark.parametrize("length", [15, 16])  # 15 divides the number of tokens
def test_validation_is_fixed_spread_and_does_not_overlap(make_corpus: MakeCorpus, length: int) -> None:
    corpus = make_corpus(numbered_shards(3, 10, 40))
    tokens = corpus.tokens()
    n_windows = (len(tokens) - 1) // length
    batches = list(validation_batches(corpus, length, 4, 10, with_boundaries=True))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
    again = list(validation_batches(corpus, length, 5, 10, with_boundaries=True))
    assert torch.equal(collect(batches), collect(again))
    place = {tuple(tokens[i * length : (i + 1) * length + 1].tolist()): i for i in range(n_windows)}
    chosen = [place[tuple(row)] for row in collect(batches).tolist()]
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1
    assert chosen[0] < n_windows / 10
    assert chosen[-1] >= n_windows * 0.85
    whole = collect(list(validation_batches(corpus, length, 4, 10**6, with_boundaries=False)))
    assert np.array_equal(whole[:, 1:].flatten().numpy(), tokens[1 : n_windows * length + 1])
