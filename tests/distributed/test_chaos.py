"""Twelve things that happen to one run; `python -m tests.distributed.chaos` does it with any number."""

from pathlib import Path

import pytest

from tests.distributed.chaos import INSIDE, OUTSIDE, chaos, draw


def test_events_are_a_function_of_the_seed_and_of_every_kind() -> None:
    assert draw(12, 3) == draw(12, 3) != draw(12, 4)
    assert {event.kind for event in draw(12, 3)} == {*INSIDE, *OUTSIDE}


@pytest.mark.slow
def test_a_run_to_which_everything_happens_finishes_as_if_nothing_had(tmp_path: Path, corpus: Path) -> None:
    chaos(tmp_path / "chaos", corpus, n_events=12, seed=11)
