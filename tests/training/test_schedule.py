import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.config import ScheduleConfig, ScheduleKind
from mamba_train.training.schedule import learning_rate


@given(
    kind=st.sampled_from(ScheduleKind),
    total=st.integers(1, 2000),
    warmup_share=st.floats(0, 1),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_stays_between_zero_and_the_peak_and_falls_after_warmup(
    kind: ScheduleKind, total: int, warmup_share: float, ratio: float, decay: float
) -> None:
    schedule = ScheduleConfig(kind, int(warmup_share * total), ratio, decay)
    rates = [learning_rate(step, 3.0, schedule, total) for step in range(1, total + 1)]
    assert all(0 <= rate <= 3.0 + 1e-9 for rate in rates)
    warm, rest = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert warm == sorted(warm)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(rest))


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    schedule = ScheduleConfig(ScheduleKind.cosine, warmup_steps=4)
    assert [learning_rate(s, 8.0, schedule, 100) for s in (1, 2, 3, 4)] == [2.0, 4.0, 6.0, 8.0]


def test_cosine_passes_its_middle_and_ends_at_the_floor() -> None:
    schedule = ScheduleConfig(ScheduleKind.cosine, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(60, 1.0, schedule, 110) == pytest.approx(0.55)
    assert learning_rate(35, 1.0, schedule, 110) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(110, 1.0, schedule, 110) == pytest.approx(0.1)
    assert learning_rate(500, 1.0, schedule, 110) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear() -> None:
    schedule = ScheduleConfig(ScheduleKind.wsd, warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert [learning_rate(s, 1.0, schedule, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(90, 1.0, schedule, 100) == pytest.approx(0.5)
    assert learning_rate(100, 1.0, schedule, 100) == pytest.approx(0.0)


def test_constant() -> None:
    schedule = ScheduleConfig(ScheduleKind.constant, warmup_steps=0)
    assert {learning_rate(s, 0.5, schedule, 10) for s in range(1, 11)} == {0.5}
