"""The counters of a run, to and from a checkpoint."""

import pytest

from mamba_train.training.state import TrainState


def test_a_state_comes_back_and_one_of_a_later_version_is_named() -> None:
    state = TrainState(step=3, skipped_steps=[2])
    state.guard.losses = [1.0]
    values = state.to_json()
    assert TrainState.from_json(values) == state
    assert TrainState.from_json({"step": 3}).step == 3, "an earlier version knew less"
    for later in ({**values, "wisdom": 1}, {**values, "guard": {"wisdom": 1}}):
        with pytest.raises(ValueError, match=r"another version of the code.*unexpected keyword argument 'wisdom'"):
            TrainState.from_json(later)
