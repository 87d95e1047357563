import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.data.order import epoch_key, permute


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_it_is_a_bijection_for_any_n(n: int, seed: int, epoch: int) -> None:
    places = permute(np.arange(n), n, epoch_key(seed, epoch))
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(n))


@given(n=st.integers(1, 2**62), data=st.data())
@settings(max_examples=200, deadline=None)
def test_large_n_stays_in_range_and_does_not_collide(n: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    places = permute(np.array(index), n, epoch_key(1, 2))
    assert places.min() >= 0
    assert places.max() < n
    assert len(set(places.tolist())) == len(index)


def test_one_index_at_a_time_gives_the_same_as_all_at_once() -> None:
    n, key = 1_000, epoch_key(3, 4)
    together = permute(np.arange(n).reshape(10, 100), n, key)
    assert together.shape == (10, 100)
    alone = [int(permute(np.array(i), n, key)) for i in range(n)]
    assert together.ravel().tolist() == alone


def test_the_order_is_pinned() -> None:
    # A checkpoint's position means nothing under another order: change ORDER_VERSION with this list.
    pinned = [1, 9, 0, 7, 2, 3, 8, 4, 11, 6, 5, 10]
    assert permute(np.arange(12), 12, epoch_key(0, 0)).tolist() == pinned
    of_a_source = [6, 0, 8, 5, 1, 10, 3, 9, 2, 7, 4, 11]
    assert permute(np.arange(12), 12, epoch_key(0, 0, "pile")).tolist() == of_a_source


def test_seeds_and_epochs_have_their_own_orders() -> None:
    orders = {
        tuple(permute(np.arange(100), 100, epoch_key(seed, epoch)).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("n", [2, 3, 7, 16, 50])
def test_each_place_is_about_equally_likely(n: int) -> None:
    trials = 4_000
    counts = np.zeros((n, n))
    for epoch in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, epoch_key(7, epoch))] += 1
    expected = trials / n
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_neighbours_are_spread() -> None:
    n = 10_000
    places = permute(np.arange(n), n, epoch_key(0, 0))
    # The mean distance of two independent places is n / 3.
    assert abs(np.abs(np.diff(places)).mean() / (n / 3) - 1) < 0.05


@pytest.mark.parametrize(("index", "n"), [([5], 5), ([-1], 5), ([0], 0), ([0], 2**62 + 1)])
def test_out_of_range_is_refused(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match=r"outside|expected 1"):
        permute(np.array(index), n, epoch_key(0, 0))
