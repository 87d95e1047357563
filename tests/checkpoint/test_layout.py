from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.checkpoint import layout

steps = st.integers(0, 10**12)


@settings(deadline=None)
@given(steps)
def test_the_name_of_a_step_gives_the_step_back(step):
    assert layout.parse_step(layout.step_name(step)) == step


@settings(deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"(step_)?[-0-9_ .a-z]{1,12}", fullmatch=True)))
def test_only_canonical_names_are_steps(name):
    step = layout.parse_step(name)
    assert step is None or layout.step_name(step) == name


def test_names_that_are_nearly_steps_are_refused():
    for name in (
        "step_500",
        "step_000000500",
        "step_00000500.tmp",
        "step_-0000500",
        "step_٠٠٠٠٠٥٠٠",
        "step_00000500\n",
    ):
        assert layout.parse_step(name) is None, name
    assert layout.parse_step("step_123456789") == 123456789


@settings(deadline=None)
@given(st.sampled_from([layout.WRITING, layout.REPLACED, layout.DELETED]), steps)
def test_a_name_aside_says_what_it_is_and_is_no_step(purpose, step):
    name = layout.aside_name(purpose, step)
    aside = layout.parse_aside(name)
    assert aside is not None
    assert (aside.purpose, aside.step) == (purpose, step)
    assert layout.parse_step(name) is None
    assert layout.aside_name(purpose, step) != name


def test_hosts_with_dots_and_dashes_are_understood():
    aside = layout.parse_aside("writing.step_00000500.node-3.cluster.org.4711.0123abcd")
    assert aside == layout.Aside("writing", 500, "node-3.cluster.org", 4711)


@settings(deadline=None)
@given(st.text())
def test_other_names_are_not_aside(name):
    assert layout.parse_aside(name) is None


def test_newest_first_is_by_number_not_by_time(tmp_path):
    for step in (123456789, 20, 500, 3):
        (tmp_path / layout.step_name(step)).mkdir()
    (tmp_path / "writing.step_00000900.h.1.00000000").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert [step for step, _ in layout.step_folders(tmp_path)] == [123456789, 500, 20, 3]
    assert layout.step_folders(tmp_path / "absent") == []
