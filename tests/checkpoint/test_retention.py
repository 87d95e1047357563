import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.checkpoint import apply_retention, complete_steps, load, newest_complete, save, steps_to_delete

steps_lists = st.lists(st.integers(0, 2000), max_size=30)
keep = st.integers(1, 6)
interval = st.none() | st.integers(1, 500)
best = st.none() | st.integers(0, 2000)


@settings(deadline=None)
@given(steps_lists, keep, interval, best)
def test_what_is_kept(steps, keep_last, permanent, best_step):
    deleted = steps_to_delete(steps, keep_last=keep_last, permanent_interval_steps=permanent, best_step=best_step)
    kept = set(steps) - set(deleted)
    assert set(deleted) <= set(steps)
    assert set(sorted(set(steps))[-keep_last:]) <= kept, "the newest ones stay"
    if steps:
        assert max(steps) in kept
    assert best_step not in deleted
    if permanent is not None:
        assert all(step % permanent != 0 for step in deleted)
    allowed = {step for step in steps if permanent is not None and step % permanent == 0} | {best_step}
    assert len(kept - allowed) <= keep_last, "nothing else stays"


@settings(deadline=None)
@given(steps_lists, keep, interval, best)
def test_deleting_twice_deletes_nothing_more(steps, keep_last, permanent, best_step):
    rule = {"keep_last": keep_last, "permanent_interval_steps": permanent, "best_step": best_step}
    kept = set(steps) - set(steps_to_delete(steps, **rule))
    assert steps_to_delete(kept, **rule) == []


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"permanent_interval_steps": 0}])
def test_senseless_settings_name_their_key(wrong):
    settings = {"keep_last": 1, "permanent_interval_steps": None, "best_step": None} | wrong
    with pytest.raises(ValueError, match=f"checkpoint.{next(iter(wrong))}"):
        steps_to_delete([1, 2], **settings)


def test_a_run_with_retention(folder, make_checkpoint):
    for step in range(10, 130, 10):
        save(folder, make_checkpoint(step), reserve_gib=0)
        apply_retention(folder, keep_last=2, permanent_interval_steps=50, best_step=30)
    assert complete_steps(folder) == [120, 110, 100, 50, 30]
    assert len(list(folder.iterdir())) == 5


def test_a_damaged_newest_one_does_not_count(folder, make_checkpoint):
    for step in (1, 2, 3):
        path = save(folder, make_checkpoint(step), reserve_gib=0)
    (path / "model" / "rank_00000.safetensors").write_bytes(b"torn")
    assert apply_retention(folder, keep_last=1, permanent_interval_steps=None, best_step=None) == [1]
    lines: list[str] = []
    chosen = newest_complete(folder, lines.append)
    assert chosen is not None
    assert load(chosen).step == 2
    assert path.exists()
