"""What a checkpoint keeps of the data, and what it refuses to go on with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_train.data.batches import BatchSource, WindowForm
from mamba_train.data.corpus import Corpus
from mamba_train.data.position import restore, state_of
from tests.data.folders import numbered, write_folder

MakeCorpus = Callable[..., Corpus]
STAGES = [(0, {"a": 0.5, "b": 0.5}), (10, {"a": 0.1, "b": 0.9})]


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Corpus]:
    """Three corpora of 4, 6 and 2 shards."""
    return {name: corpus(tmp_path / name, n, n * 3000) for name, n in (("a", 4), ("b", 6), ("c", 2))}


def corpus(folder: Path, n_shards: int, first: int) -> Corpus:
    shards = [("", numbered(first + 300 * number, 10, 30)) for number in range(n_shards)]
    return Corpus.open(write_folder(folder, {"train": shards}), "train")


def mixed(
    corpora: dict[str, Corpus], stages: list[tuple[int, dict[str, float]]] = STAGES, batch_size: int = 6
) -> BatchSource:
    return BatchSource(corpora, batch_size, 3, WindowForm(8, False), stages)


def saved(source: BatchSource, samples: int) -> dict[str, Any]:
    """A state as a checkpoint gives it back."""
    return json.loads(json.dumps(state_of(source, samples)))


def test_it_is_small_and_does_not_grow(corpora: dict[str, Corpus], make_corpus: MakeCorpus) -> None:
    single = BatchSource({"": make_corpus([[[1] * 300]])}, 6, 3, WindowForm(8, False))
    assert len(json.dumps(state_of(single, 0))) < 250
    sizes = []
    for corpus_of in (corpora, {**corpora, "a": corpora["b"]}):  # another size of corpus
        source = mixed(corpus_of)
        for step in (0, 1, 1000, 10**6):
            state = saved(source, 6 * step)
            for _ in range(3):  # restarts
                restarted = mixed(corpus_of)
                restore(restarted, state, step, allow_changed=False)
                state = saved(restarted, 6 * step)
            assert state["samples"] == 6 * step
            sizes.append(len(json.dumps({**state, "samples": 0})))
    assert len(set(sizes)) == 1
    assert sizes[0] < 500


def test_a_restart_gives_the_same_samples(corpora: dict[str, Corpus]) -> None:
    first = mixed(corpora)
    restarted = mixed(corpora)
    assert restore(restarted, saved(first, 6 * 15), 15, allow_changed=False) == []
    for sample in (0, 60, 90, 600):
        assert np.array_equal(first.batch(sample, slice(None)).tokens, restarted.batch(sample, slice(None)).tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"seed=3: the checkpoint was trained with 4; set seed=4"),
        ({"sequence_length": 9}, r"data\.sequence_length=8: .* with 9; set data\.sequence_length=9"),
        ({"fingerprints": {"": "f" * 16}}, r"data\.path.* saved ffffffffffff\).*data\.allow_changed=true"),
        ({"order": "older"}, "older"),
        ({"samples": -1}, "samples=-1"),
        ({"samples": "7"}, "samples='7'"),
    ],
)
def test_a_foreign_state_is_refused(make_corpus: MakeCorpus, change: dict[str, object], message: str) -> None:
    source = BatchSource({"": make_corpus([[[1] * 300]])}, 6, 3, WindowForm(8, False))
    with pytest.raises(ValueError, match=message) as caught:
        restore(source, {**saved(source, 6), **change}, 1, allow_changed=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["samples", "seed", "sequence_length", "fingerprints", "order", "stages", "changes"])
def test_a_state_with_a_part_missing_is_refused(make_corpus: MakeCorpus, key: str) -> None:
    source = BatchSource({"": make_corpus([[[1] * 300]])}, 6, 3, WindowForm(8, False))
    state = saved(source, 6)
    del state[key]
    with pytest.raises(ValueError, match=f"has no {key}"):
        restore(source, state, 1, allow_changed=False)


@pytest.mark.parametrize(
    ("stages", "step"),
    [
        ([(0, {"a": 1.0, "b": 3.0})], 7),
        ([(0, {"a": 0.5, "b": 0.5}), (5, {"b": 1.0})], 7),
        ([(0, {"a": 0.5, "b": 0.5}), (10, {"a": 0.1000001, "b": 0.9})], 11),
        ([(0, {"a": 0.5, "b": 0.5})], 11),
    ],
    ids=["other weights", "a stage in the past", "a weight that is a little different", "a stage left out"],
)
def test_the_mixture_of_steps_that_are_done_may_not_change(
    corpora: dict[str, Corpus], stages: list[tuple[int, dict[str, float]]], step: int
) -> None:
    state = saved(mixed(corpora), 6 * step)
    with pytest.raises(ValueError, match=rf"data\.mixture: {step} steps are done, .*50% a \+ 50% b") as caught:
        restore(mixed(corpora, stages), state, step, allow_changed=True)
    assert "\n" not in str(caught.value)


def test_the_mixture_of_steps_to_come_may_change(corpora: dict[str, Corpus]) -> None:
    first = mixed(corpora)
    stages = [(0, {"a": 2, "b": 2}), (7, {"b": 1.0, "c": 1.0}), (20, {"c": 1.0})]
    other = mixed(corpora, stages)
    restore(other, saved(first, 6 * 7), 7, allow_changed=False)
    tokens = [[source.batch(6 * step, slice(None)).tokens for step in range(9)] for source in (first, other)]
    same = [bool((ours == theirs).all()) for ours, theirs in zip(*tokens, strict=True)]
    assert same[:7] == [True] * 7
    assert not all(same[7:])
    # And a second restart, of which the new stages are the past.
    again = mixed(corpora, stages)
    restore(again, saved(other, 6 * 9), 9, allow_changed=False)
    with pytest.raises(ValueError, match=r"data\.mixture: 9 steps are done"):
        restore(mixed(corpora), saved(other, 6 * 9), 9, allow_changed=False)


def test_no_mixture_cannot_become_one(corpora: dict[str, Corpus]) -> None:
    single = BatchSource({"": corpora["a"]}, 6, 3, WindowForm(8, False))
    with pytest.raises(ValueError, match=r"fed by \[from step 0: 100% everything\]"):
        restore(mixed(corpora), saved(single, 6), 1, allow_changed=False)


def test_another_batch_size_moves_the_stages_to_come_and_not_the_past(corpora: dict[str, Corpus]) -> None:
    """Stages begin at steps: after a change of the batch size these are other samples."""
    first = mixed(corpora)
    larger = mixed(corpora, batch_size=12)
    restore(larger, saved(first, 6 * 4), 4, allow_changed=False)
    assert [stage.from_sample for stage in larger.mixture.stages] == [0, 6 * 4 + 12 * 6]
    smaller = mixed(corpora, batch_size=3)
    restore(smaller, saved(larger, 6 * 4 + 12 * 16), 20, allow_changed=False)
    assert [stage.from_sample for stage in smaller.mixture.stages] == [0, 96]
    samples = np.arange(6 * 4 + 12 * 16)
    assert all(np.array_equal(a, b) for a, b in zip(larger.windows(samples), smaller.windows(samples), strict=True))


def test_changed_tokens_are_refused_and_an_override_is_recorded(tmp_path: Path, corpora: dict[str, Corpus]) -> None:
    changed = {**corpora, "b": corpus(tmp_path / "other", 6, 20_000)}
    first = mixed(corpora)
    with pytest.raises(ValueError, match=r"of b .*data\.allow_changed=true"):
        restore(mixed(changed), saved(first, 60), 10, allow_changed=False)
    source = mixed(changed)
    assert restore(source, saved(first, 60), 10, allow_changed=True) == ["b"]
    state = saved(source, 66)
    assert state["changes"] == [{"samples": 60, "sources": ["b"]}]
    again = mixed(changed)
    assert restore(again, state, 11, allow_changed=True) == []
    assert saved(again, 72)["changes"] == state["changes"]


def test_a_source_that_has_not_been_read_yet_may_change(tmp_path: Path, corpora: dict[str, Corpus]) -> None:
    stages = [(0, {"a": 1.0}), (10, {"b": 1.0})]
    state = saved(mixed(corpora, stages), 60)
    changed = {**corpora, "b": corpus(tmp_path / "other", 6, 20_000)}
    assert restore(mixed(changed, stages), state, 10, allow_changed=False) == []
    with pytest.raises(ValueError, match="of b "):
        restore(mixed(changed, stages), {**state, "samples": 66}, 11, allow_changed=False)


def test_order_of_shards_and_tokenizer_are_in_the_fingerprint(tmp_path: Path) -> None:
    shards = [("", [[1, 2, 3]]), ("", [[4, 5, 6]])]

    def fingerprint(name: str, shards: list[Any], **more: Any) -> str:
        return Corpus.open(write_folder(tmp_path / name, {"train": shards}, **more), "train").fingerprint

    ours = fingerprint("ours", shards)
    assert fingerprint("again", shards) == ours
    assert fingerprint("turned", shards[::-1]) != ours
    assert fingerprint("edited", [shards[0], ("", [[4, 5, 7]])]) != ours
    assert fingerprint("tokenizer", shards, tokenizer=b"{ }") != ours
