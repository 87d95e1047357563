import json
import random

import numpy
import pytest
import torch

from mamba_train.checkpoint import Checkpoint, load, rng, save
from mamba_train.checkpoint.storage import load_rng


def _draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        random.randrange(2**70),
        numpy.random.rand(3).tolist(),
        numpy.random.standard_normal(1).tolist(),
        torch.rand(5).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(9).tolist(),
    ]


@pytest.fixture(autouse=True)
def _leave_the_generators_as_they_were():
    states = rng.capture()
    yield
    rng.restore(states)


@pytest.mark.parametrize("drawn_before", range(4))
def test_the_same_numbers_come_again_through_a_file(folder, drawn_before):
    random.seed(drawn_before)
    numpy.random.seed(drawn_before)
    torch.manual_seed(drawn_before)
    for _ in range(drawn_before):  # odd counts leave half a pair of Gaussian numbers in the generators
        random.gauss(0, 1)
        numpy.random.standard_normal(1)
        torch.randn(1)
    path = save(folder, Checkpoint(1, {"w": torch.ones(1)}, rng=rng.capture()), reserve_gib=0)
    expected = _draw()
    assert _draw() != expected
    assert rng.restore(load(path).rng) == []
    assert _draw() == expected


def test_a_rank_that_there_was_not_has_no_state(folder):
    path = save(folder, Checkpoint(1, {"w": torch.ones(1)}, rng=rng.capture()), reserve_gib=0)
    assert load_rng(path, 0).keys() == rng.capture().keys()
    assert load_rng(path, 1) == {}


def test_states_are_flat_bytes():
    states = rng.capture()
    assert {"python", "numpy", "torch_cpu"} <= states.keys()
    assert all(state.dtype == torch.uint8 and state.dim() == 1 for state in states.values())
    assert json.loads(bytes(states["python"].tolist()))[0] == 3


def test_a_state_without_its_device_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rng.restore({"torch_cuda": torch.zeros(16, dtype=torch.uint8)}) == ["torch_cuda"]
    assert rng.restore({"torch_xpu": torch.zeros(16, dtype=torch.uint8)}) == ["torch_xpu"]
