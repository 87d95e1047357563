"""What is drawn has the probabilities that it should have."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.inference.sampling import NOT_FINITE, Sampling, choose, uniform_draws

PROBABILITIES = torch.tensor([0.05, 0.4, 0.15, 0.1, 0.3])
LOGITS = PROBABILITIES.log()


def frequencies(sampling: Sampling, n: int = 20_000) -> torch.Tensor:
    """How often each token comes for draws that are spread evenly: no chance in this test."""
    uniform = (torch.arange(n) + 0.5) / n
    return torch.bincount(choose(LOGITS.expand(n, -1), sampling, uniform), minlength=5) / n


def test_draws_follow_the_distribution_and_what_is_cut_from_it() -> None:
    torch.testing.assert_close(frequencies(Sampling()), PROBABILITIES, atol=1e-3, rtol=0)
    warm = torch.softmax(LOGITS / 2, -1)
    torch.testing.assert_close(frequencies(Sampling(temperature=2.0)), warm, atol=1e-3, rtol=0)
    two = torch.tensor([0, 0.4, 0, 0, 0.3]) / 0.7
    torch.testing.assert_close(frequencies(Sampling(top_k=2)), two, atol=1e-3, rtol=0)
    # 0.4 + 0.3 are less than 0.75, so the third token is the one that reaches it.
    three = torch.tensor([0, 0.4, 0.15, 0, 0.3]) / 0.85
    torch.testing.assert_close(frequencies(Sampling(top_p=0.75)), three, atol=1e-3, rtol=0)
    # Where the tokens before it have exactly that much, a token is not in the smallest set.
    halves = torch.bincount(choose(torch.zeros(100, 4), Sampling(top_p=0.5), torch.arange(100) / 100), minlength=4)
    assert sorted(halves.tolist()) == [0, 0, 50, 50]
    # top_p is of what top_k left: 0.4 / 0.7 is more than 0.55.
    assert frequencies(Sampling(top_k=2, top_p=0.55))[1] == 1
    assert frequencies(Sampling(temperature=0))[1] == 1


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    st.floats(0.05, 5),
    st.none() | st.integers(1, 30),
    st.floats(1e-6, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_token_of_the_vocabulary_with_some_probability_is_drawn(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, uniform: float
) -> None:
    row = torch.tensor([logits])
    token = int(choose(row, Sampling(temperature, top_k, top_p), torch.tensor([uniform])))
    assert 0 <= token < len(logits)
    assert sum(value > row[0, token] for value in row[0]) < (top_k or len(logits))


def test_logits_that_are_not_finite_have_no_token() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    assert choose(logits, Sampling(), torch.zeros(3)).tolist() == [0, NOT_FINITE, 0]
    assert choose(logits, Sampling(temperature=0), torch.zeros(3))[1] == NOT_FINITE


def test_each_row_has_draws_of_its_own() -> None:
    draws = uniform_draws(Sampling(seed=3), 2, torch.device("cpu"))
    both = torch.stack([next(draws) for _ in range(5)])
    second = uniform_draws(Sampling(seed=4), 1, torch.device("cpu"))
    assert both[:, 1].tolist() == [float(next(second)) for _ in range(5)]
    assert (both[:, 0] != both[:, 1]).all()
