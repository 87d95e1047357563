"""Shares that are exact, an order that is a function, and stages that begin anywhere."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.data.mixture import BLOCK_SAMPLES, Mixture, Stage, apportion, shares_of

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.001, 1.0), min_size=1, max_size=8)


def one_stage(weights: dict[str, float], seed: int = 0) -> Mixture:
    return Mixture([Stage(0, 0, weights)], seed)


def counts(mixture: Mixture, first: int, end: int) -> np.ndarray:
    """How many samples each source has among first..end, counted one by one."""
    return np.bincount(mixture.locate(np.arange(first, end))[0], minlength=len(mixture.names))


@given(WEIGHTS, st.integers(0, 10**12))
def test_apportion_is_within_one_sample_of_each_share(weights: dict[str, float], n: int) -> None:
    shares = list(shares_of(weights).values())
    assert sum(shares) == 1
    found = apportion(n, shares)
    assert sum(found) == n
    assert all(abs(count - n * share) < 1 for count, share in zip(found, shares, strict=True))


def test_apportion_by_hand() -> None:
    thirds = [Fraction(1, 3)] * 3
    assert apportion(2, thirds) == [1, 1, 0]
    assert apportion(4, thirds) == [2, 1, 1]
    assert apportion(10, [Fraction(47, 100), Fraction(16, 100), Fraction(37, 100)]) == [5, 1, 4]


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_each_block_has_its_exact_shares(weights: dict[str, float], seed: int, block: int) -> None:
    mixture = one_stage(weights, seed)
    [stage] = mixture.stages
    size = stage.block_samples
    before, after = mixture.consumed(block * size), mixture.consumed((block + 1) * size)
    assert after.sum() == (block + 1) * size
    for given_so_far, samples in ((before, block * size), (after, (block + 1) * size)):
        for count, share in zip(given_so_far.tolist(), stage.shares.values(), strict=True):
            assert abs(count - samples * share) < 1
    assert (after >= before).all()
    assert np.array_equal(counts(mixture, block * size, (block + 1) * size), after - before)


@pytest.mark.parametrize("weights", [{"rare": 0.001, "rest": 0.999}, {"rare": 0.999, "rest": 0.001}])
def test_extreme_shares_are_exact_in_each_block_and_in_the_long_run(weights: dict[str, float]) -> None:
    mixture = one_stage(weights)
    whole = np.zeros(2, dtype=np.int64)
    for block in range(125):  # 125 blocks are 256,000 samples: 256 of them are rare
        found = counts(mixture, block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES)
        assert min(found) in (2, 3)
        assert sum(found) == BLOCK_SAMPLES
        whole += found
        assert abs(min(whole) - 0.001 * (block + 1) * BLOCK_SAMPLES) < 1
    assert min(whole) == 256
    # 146 million samples of 2,048 tokens are 300 billion tokens.
    assert min(mixture.consumed(146_000_000 // BLOCK_SAMPLES * BLOCK_SAMPLES)) in (145_999, 146_000)


def test_a_share_of_less_than_a_sample_per_block_makes_longer_blocks() -> None:
    mixture = one_stage({"rare": 1, "rest": 9999})
    [stage] = mixture.stages
    assert stage.block_samples == 8 * BLOCK_SAMPLES
    for block in range(4):
        assert min(counts(mixture, block * stage.block_samples, (block + 1) * stage.block_samples)) in (1, 2)
    with pytest.raises(
        ValueError, match=r"data\.mixture: rare has a share of 1\.0e-07, less than one sample in a million"
    ):
        shares_of({"rare": 1e-7, "rest": 1 - 1e-7})


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.lists(st.integers(0, 6000), min_size=0, max_size=3))
@settings(max_examples=40, deadline=None)
def test_no_sample_of_a_source_is_left_out_or_repeated(
    weights: dict[str, float], seed: int, lengths: list[int]
) -> None:
    """Through changes of the stage at any sample, inside of blocks as well."""
    stages, start = [Stage(0, 0, weights)], 0
    for number, length in enumerate(lengths):
        start += length + 1
        turned = dict(zip(weights, [*list(weights.values())[1:], 0.5], strict=True))
        stages.append(Stage(number + 1, start, turned if number % 2 == 0 else weights))
    mixture = Mixture(stages, seed)
    total = start + 5000
    sources, ordinals = mixture.locate(np.arange(total))
    consumed = mixture.consumed(total)
    for number in range(len(mixture.names)):
        mine = ordinals[sources == number]
        assert np.array_equal(mine, np.arange(consumed[number])), "the samples of a source come in their order"
    # A sample's place does not depend on what it is asked together with.
    some = np.random.default_rng(0).permutation(total)[:50]
    again = mixture.locate(some)
    assert np.array_equal(again[0], sources[some])
    assert np.array_equal(again[1], ordinals[some])
    for end in (0, 1, start, total // 2):
        assert np.array_equal(mixture.consumed(end), np.bincount(sources[:end], minlength=len(mixture.names)))


def test_the_past_does_not_depend_on_stages_to_come() -> None:
    first = Stage(0, 0, {"a": 1, "b": 2})
    alone, followed = Mixture([first], 5), Mixture([first, Stage(10, 5000, {"c": 1.0})], 5)
    names_alone = [alone.names[n] for n in alone.locate(np.arange(5000))[0]]
    names_followed = [followed.names[n] for n in followed.locate(np.arange(5000))[0]]
    assert names_alone == names_followed
    assert {followed.names[n] for n in followed.locate(np.arange(5000, 9000))[0]} == {"c"}


def test_blocks_are_permuted_each_in_its_own_way() -> None:
    mixture = one_stage({"a": 0.5, "b": 0.5})
    orders = [mixture.locate(np.arange(b * BLOCK_SAMPLES, (b + 1) * BLOCK_SAMPLES))[0].tolist() for b in range(4)]
    orders.append(one_stage({"a": 0.5, "b": 0.5}, seed=1).locate(np.arange(BLOCK_SAMPLES))[0].tolist())
    assert len({tuple(order) for order in orders}) == 5
    # Alternating or sorted sources would have 2,047 or 1 changes; at random there are about half as many as places.
    changes = np.count_nonzero(np.diff(orders[0]))
    assert 900 < changes < 1150


def test_the_order_is_pinned() -> None:
    # A checkpoint's position means nothing under another order: change ORDER_VERSION with these lists.
    mixture = one_stage({"b": 3, "a": 1})
    sources, ordinals = mixture.locate(np.arange(2040, 2056))
    assert sources.tolist() == [1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1]
    assert ordinals.tolist() == [
        1531,
        509,
        1532,
        1533,
        1534,
        1535,
        510,
        511,
        512,
        1536,
        1537,
        1538,
        1539,
        1540,
        513,
        1541,
    ]


def test_names_and_weights_in_another_order_are_the_same_mixture() -> None:
    ours, theirs = one_stage({"a": 1, "b": 3}), one_stage({"b": 0.75, "c": 0, "a": 0.25})
    samples = np.arange(5000)
    assert ours.names == theirs.names == ["a", "b"]
    assert all(np.array_equal(a, b) for a, b in zip(ours.locate(samples), theirs.locate(samples), strict=True))


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 2.0, "b": -1.0}])
def test_weights_that_cannot_be_shares(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights of 0 or more, at least one of them above 0"):
        shares_of(weights)


def test_memory_does_not_grow_with_the_position() -> None:
    """A million blocks on, it is as fast to ask and nothing has been kept."""
    mixture = one_stage({"a": 0.3, "b": 0.7})
    far = 10**15
    sources, ordinals = mixture.locate(np.arange(far, far + 4096))
    assert abs((ordinals[sources == 0][0]) - 0.3 * far) < BLOCK_SAMPLES
    assert sum(np.asarray(value).nbytes for value in vars(mixture).values() if isinstance(value, np.ndarray)) < 100
