import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from mamba_train.data.batches import IGNORE_INDEX, Batch, BatchSource, WindowForm, document_numbers
from mamba_train.data.corpus import Corpus, ReadError
from mamba_train.data.validation import validation_sets
from tests.data.folders import write_folder

MakeCorpus = Callable[..., Corpus]


def make_source(corpus: Corpus, length: int, batch_size: int, seed: int, with_boundaries: bool) -> BatchSource:
    """A source of one corpus without a mixture."""
    return BatchSource({"": corpus}, batch_size, seed, WindowForm(length, with_boundaries))


def epoch_of(source: BatchSource) -> int:
    """The number of windows of the only corpus."""
    return int(source.n_windows[0])


def windows(source: BatchSource, samples: np.ndarray) -> np.ndarray:
    return source.windows(samples)[1]


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
    source = make_source(corpus, length, 1, seed=0, with_boundaries=False)
    for epoch in range(3):
        first = epoch * epoch_of(source)
        found = windows(source, first + np.arange(epoch_of(source)))
        assert sorted(found.tolist()) == list(range(epoch_of(source)))
        targets: Counter[int] = Counter()
        inputs: set[int] = set()
        for sample in range(first, first + epoch_of(source)):
            batch = source.batch(sample, slice(None))
            targets.update(batch.targets.flatten().tolist())
            inputs.update(batch.inputs.flatten().tolist())
        assert set(targets) | inputs == set(tokens.tolist())
        repeated = epoch_of(source) * length - (len(tokens) - 1)
        assert 0 <= repeated < length
        assert sum(targets.values()) - repeated == len(tokens) - 1


def test_windows_are_stretches_of_the_corpus_that_cross_shards(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(4, 2, 9))
    tokens = corpus.tokens()
    source = make_source(corpus, 16, 8, seed=5, with_boundaries=False)
    found = windows(source, np.arange(3 * epoch_of(source)))
    rows = torch.cat([source.batch(s, slice(0, 1)).tokens for s in range(3 * epoch_of(source))])
    for window, row in zip(found.tolist(), rows.numpy(), strict=True):
        start = min(window * 16, len(tokens) - 17)
        assert np.array_equal(row, tokens[start : start + 17])


def test_epochs_and_seeds_differ(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(numbered_shards(1, 20, 50))
    source = make_source(corpus, 16, 1, seed=0, with_boundaries=False)
    n = epoch_of(source)
    orders = [windows(source, epoch * n + np.arange(n)).tolist() for epoch in range(3)]
    orders.append(windows(make_source(corpus, 16, 1, seed=1, with_boundaries=False), np.arange(n)).tolist())
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
        return make_source(corpus, 16, batch_size, seed=9, with_boundaries=True)

    reference = [new_source().batch(step * batch_size, slice(None)).tokens for step in range(40)]
    assert len(reference) * batch_size > 2 * epoch_of(new_source())  # beyond two epochs
    for ranks, accumulation in [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3)]:
        # A restart at each step, in any order of steps: nothing is remembered between calls.
        for step in [39, 0, 1, 20, 12, 13]:
            found = global_step(new_source(), step, batch_size, ranks, accumulation)
            assert torch.equal(found, reference[step])
    source = new_source()  # nor does it, when a run goes back to an earlier step
    for step in [39, 20, 0, 21, 1]:
        assert torch.equal(global_step(source, step, batch_size, 1, 1), reference[step])
    swapped = global_step(new_source(), 3, batch_size, 2, 1, swap=True)
    assert not torch.equal(swapped, reference[3])


def test_rows_may_be_ranges_with_a_stride_and_must_stay_inside(make_corpus: MakeCorpus) -> None:
    source = make_source(make_corpus(numbered_shards(1, 10, 30)), 8, 6, seed=0, with_boundaries=False)
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
    batch = make_source(corpus, 8, 3, seed=0, with_boundaries=True).batch(0, slice(None)).to("cpu")
    assert batch.seq_idx is not None
    assert (batch.tokens.dtype, batch.seq_idx.dtype) == (torch.int64, torch.int32)
    assert batch.tokens.shape == batch.seq_idx.shape == (3, 9)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.seq_idx.max() >= 1
    without = make_source(corpus, 8, 3, seed=0, with_boundaries=False).batch(0, slice(None))
    assert without.seq_idx is None
    assert torch.equal(without.tokens, batch.tokens)
    assert without.to("cpu").seq_idx is None


def test_a_corpus_of_one_window_works_and_a_smaller_one_is_refused(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[[1, 2, 3, 4]]])
    source = make_source(corpus, 4, 2, seed=0, with_boundaries=True)
    assert source.batch(7, slice(None)).tokens.tolist() == [[1, 2, 3, 4, 0]] * 2
    with pytest.raises(ValueError, match=r"data\.sequence_length=5: the train split has only 5 tokens"):
        make_source(corpus, 5, 2, seed=0, with_boundaries=True)
    with pytest.raises(ValueError, match=r"data\.sequence_length=5: the train split of books has"):
        validation_sets({"books": corpus}, WindowForm(5, with_boundaries=True), 1)
    with pytest.raises(ValueError, match=r"data\.sequence_length=0"):
        make_source(corpus, 0, 2, seed=0, with_boundaries=True)


def test_the_fingerprint_depends_on_tokens_and_their_order(make_corpus: MakeCorpus) -> None:
    shards = [[[1, 2], [3]], [[4, 5]]]
    first = make_corpus(shards).fingerprint
    assert make_corpus(shards).fingerprint == first
    assert make_corpus(shards[::-1]).fingerprint != first
    assert make_corpus([[[1, 2], [3]], [[4, 6]]]).fingerprint != first


def test_the_first_token_of_a_document_may_be_no_target(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[[1, 2], [3], [], [4, 5, 6]]])
    assert corpus.tokens().tolist() == [1, 2, 0, 3, 0, 0, 4, 5, 6, 0]
    [batch] = [WindowForm(9, False, mask_loss=mask).read([(corpus, 0)]) for mask in (True,)]
    masked = IGNORE_INDEX
    assert batch.targets.tolist() == [[2, 0, masked, 0, masked, masked, 5, 6, 0]]
    assert batch.inputs.tolist() == [[1, 2, 0, 3, 0, 0, 4, 5, 6]]
    assert batch.n_targets == 6
    assert torch.equal(batch.to("cpu").targets, batch.targets)
    plain = WindowForm(9, False).read([(corpus, 0)])
    assert plain.targets.tolist() == [[2, 0, 3, 0, 0, 4, 5, 6, 0]]
    assert plain.n_targets == 9


def test_bytes_per_target(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[[1, 2, 3], [4, 5, 6]]])  # 3 bytes a token
    for mask, expected in ((False, 18 / 8), (True, 12 / 6)):
        source = BatchSource({"": corpus}, 1, 0, WindowForm(4, False, mask))
        assert source.bytes_per_target(0) == pytest.approx(expected)


def test_a_shard_that_is_damaged_while_it_is_read_is_named(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[[1] * 20], [[2] * 20]], vocab_size=10)
    path = corpus.folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    out = np.empty(42, dtype=np.int64)
    content[2 * 7] = 10  # the first id that is none
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"train-00001\.bin: token 10 at offset 7, the vocabulary has 10"):
        corpus.read(0, out)
    corpus.read(0, out[:28])  # up to the damage
    path.write_bytes(content[: 2 * 5])
    with pytest.raises(ReadError, match=r"train-00001\.bin: token 5 of 21 is not there; it was cut short"):
        corpus.read(0, out)
    other = make_corpus([[[1] * 20]])
    (other.folder / "train-00000.bin").unlink()
    with pytest.raises(ReadError, match=r"train-00000\.bin: cannot be read at token 3: No such file"):
        other.read(3, out[:5])


def test_a_folder_made_anew_is_read_anew(tmp_path: Path) -> None:
    for token in (5, 6):
        corpus = Corpus.open(write_folder(tmp_path / "x", {"train": [("", [[token]])]}), "train")
        assert corpus.tokens().tolist() == [token, 0]
        shutil.rmtree(tmp_path / "x")


def test_no_more_files_are_open_than_allowed(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_train.data.corpus.MAX_OPEN_FILES", 3)
    corpus = make_corpus([[[number, number]] for number in range(1, 41)])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for start in [*range(0, 120, 3), 0, 3, 117]:
        out = np.empty(3, dtype=np.int64)
        corpus.read(start, out)
        assert out.tolist() == [start // 3 + 1] * 2 + [0]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert corpus.place(4) == (str(corpus.folder / "train-00001.bin"), 1)


def test_a_batch_survives_the_way_to_the_device(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between processes, and into pinned memory as the DataLoader asks for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    for vocab_size, boundaries, mask in ((60_000, True, True), (60_000, False, False), (200_000, True, False)):
        corpus = make_corpus([[[vocab_size - 1] * 5, [], [7]]], vocab_size)
        batch = WindowForm(7, boundaries, mask).read([(corpus, 0), (corpus, 1)])
        for copy in (pickle.loads(pickle.dumps(batch)), torch_pin_memory(batch)):
            assert copy.unpredictable_after == batch.unpredictable_after
            assert copy.tokens.dtype is torch.int64
            assert torch.equal(copy.tokens, batch.tokens)
            assert torch.equal(copy.targets, batch.targets)
            assert (copy.seq_idx is None) == (not boundaries)
            if boundaries:
                assert copy.seq_idx.dtype is torch.int32
                assert torch.equal(copy.seq_idx, batch.seq_idx)


@pytest.mark.parametrize(
    "more",
    [{"lengths": torch.tensor([4, 0, 2])}, {"labels": torch.tensor([[5, IGNORE_INDEX, 1]] * 3)}],
    ids=["a stream that ends", "a task"],
)
def test_what_is_no_target_survives_the_way_to_the_device(more: dict[str, torch.Tensor]) -> None:
    batch = Batch(torch.arange(12).view(3, 4), None, **more)
    n_targets = {"lengths": 3 + 0 + 1, "labels": 2 * 3}[next(iter(more))]
    for copy in (batch, pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert copy.n_targets == n_targets
        assert copy.targets.dtype is torch.int64
        assert torch.equal(copy.targets, batch.targets)


def test_the_bytes_of_a_mixture_are_those_of_its_shares(make_corpus: MakeCorpus) -> None:
    """3 bytes in each token of `a`, none in half of those of `b`, which end documents."""
    corpora = {"a": make_corpus([[list(range(1, 100))]]), "b": make_corpus([[[7]] * 50])}
    stages = [(0, {"a": 1.0, "b": 3.0}), (10, {"b": 1.0})]
    source = BatchSource(corpora, 4, 0, WindowForm(8, False), stages)
    a, b = 3 * 99 / 100, 3 * 50 / 100
    assert source.bytes_per_target(39) == pytest.approx(a / 4 + 3 * b / 4)
    assert source.bytes_per_target(40) == pytest.approx(b)


def test_sources_of_one_size_have_orders_of_their_own(make_corpus: MakeCorpus) -> None:
    """Else what lies at one place of two folders, such as two versions of a text, would always come together."""
    corpora = {name: make_corpus([[list(range(1, 400))]]) for name in ("a", "b")}
    source = BatchSource(corpora, 4, 0, WindowForm(8, False), [(0, {"a": 1.0, "b": 1.0})])
    sources, windows = source.windows(np.arange(200))
    first, second = (windows[sources == number][:50] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first == second).sum() < 10
