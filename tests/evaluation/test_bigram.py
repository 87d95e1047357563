"""The bigram baseline is a distribution, finds known chains, and beats a unigram where it should."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.evaluation import bigram
from mamba_train.evaluation.bigram import BigramModel, bigram_score

CHAIN = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.5, 0.25, 0.25]])


def sample_chain(transitions: np.ndarray, length: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).random(length)
    cumulative = transitions.cumsum(axis=1)
    tokens = np.zeros(length, dtype=np.uint16)
    for i in range(1, length):
        tokens[i] = np.searchsorted(cumulative[tokens[i - 1]], draws[i])
    return tokens


def entropy_rate(transitions: np.ndarray) -> float:
    values, vectors = np.linalg.eig(transitions.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    terms = np.where(transitions > 0, transitions * np.log(np.where(transitions > 0, transitions, 1.0)), 0.0)
    return float(-(stationary[:, None] * terms).sum())


@given(
    tokens=st.lists(st.integers(0, 6), min_size=2, max_size=60),
    extra=st.integers(0, 3),
    previous=st.integers(0, 6),
)
def test_every_context_has_a_distribution_without_zeros(tokens: list[int], extra: int, previous: int) -> None:
    vocab_size = 7 + extra  # tokens that never occur, as contexts and as followers
    model = BigramModel(np.array(tokens), vocab_size)
    for context in (previous, vocab_size - 1):
        p = model.probability(np.full(vocab_size, context), np.arange(vocab_size))
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
        assert p.min() > 0


@given(tokens=st.lists(st.integers(0, 4), min_size=2, max_size=40))
def test_probabilities_follow_the_formula(tokens: list[int]) -> None:
    pairs: dict[tuple[int, int], int] = {}
    for pair in itertools.pairwise(tokens):
        pairs[pair] = pairs.get(pair, 0) + 1
    once, twice = (sum(count == n for count in pairs.values()) for n in (1, 2))
    discount = once / (once + 2 * twice) if once and twice else 0.5
    model = BigramModel(np.array(tokens), 5)
    for v in range(5):
        seen = sum(count for (a, _), count in pairs.items() if a == v)
        followers = sum(a == v for a, _ in pairs)
        for w in range(5):
            unigram = (sum(b == w for _, b in pairs) + 1) / (len(pairs) + 5)
            expected = unigram
            if seen:
                expected = max(pairs.get((v, w), 0) - discount, 0) / seen + discount * followers / seen * unigram
            assert model.probability(np.array([v]), np.array([w]))[0] == pytest.approx(expected, rel=1e-12)


def test_reaches_the_entropy_rate_of_a_known_chain() -> None:
    train, validation = sample_chain(CHAIN, 60_000, seed=1), sample_chain(CHAIN, 60_000, seed=2)
    score = bigram_score(train, validation[None], vocab_size=3, bytes_per_token=2.0)
    assert score.nats_per_token == pytest.approx(entropy_rate(CHAIN), rel=0.01)
    assert score.bits_per_byte == pytest.approx(score.nats_per_token / math.log(2) / 2.0)
    assert score.n_train_tokens == 60_000


def test_beats_the_unigram_on_bigram_data_and_nearly_equals_it_on_unigram_data() -> None:
    def unigram_entropy(tokens: np.ndarray) -> float:
        p = np.bincount(tokens) / len(tokens)
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    train, validation = sample_chain(CHAIN, 20_000, seed=1), sample_chain(CHAIN, 20_000, seed=2)
    assert BigramModel(train, 3).nats_per_token(validation) < 0.8 * unigram_entropy(validation)
    independent = np.random.default_rng(0).integers(0, 50, 100_000)
    assert BigramModel(independent, 50).nats_per_token(independent[:20_000]) == pytest.approx(math.log(50), rel=0.02)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 5_000).clip(max=99).astype(np.uint16)
    whole = BigramModel(tokens, 100)
    expected = whole.nats_per_token(tokens)
    monkeypatch.setattr(bigram, "CHUNK_TOKENS", 37)
    chunked = BigramModel(tokens, 100)
    assert np.array_equal(whole._pairs, chunked._pairs)
    assert np.array_equal(whole._counts, chunked._counts)
    assert chunked.nats_per_token(tokens) == pytest.approx(expected, rel=1e-12)


def test_pairs_do_not_overflow_for_a_large_vocabulary() -> None:
    vocab_size = 151_936
    tokens = np.array([151_935, 0, 151_935, 151_935, 1], dtype=np.uint32)
    model = BigramModel(tokens, vocab_size)
    seen, unseen = model.probability(np.array([151_935, 1]), np.array([0, 0]))
    assert seen > 100 * unseen


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1], "at least 2 training tokens, got 1"), ([0, 1, 7], "token 7 is outside the vocabulary of 5")],
)
def test_misuse_is_one_line(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigramModel(np.array(tokens), 5)
    with pytest.raises(ValueError, match="token -1 is outside"):
        BigramModel(np.array([0, 1]), 5).nats_per_token(np.array([0, -1]))
