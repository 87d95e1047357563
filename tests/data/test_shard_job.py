from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data.documents import SPLITS, Split
from mamba_train.data.hub_text import HubText
from mamba_train.data.shard_group import label_folder
from mamba_train.data.shard_job import (
    JOB_VERSION,
    Input,
    Job,
    JobSettings,
    create_once,
    find_inputs,
    group_inputs,
)
from mamba_train.data.text_files import TEXT_SUFFIXES


def find(patterns: list[str], split: Split = "train") -> tuple[list[tuple[str, str]], list[str]]:
    log: list[str] = []
    inputs, paths = find_inputs(patterns, split, TEXT_SUFFIXES, {}, log.append)
    assert set(paths) == {entry.name for entry in inputs}
    assert all(paths[entry.name].stat().st_size == entry.size for entry in inputs)
    return [(entry.split, entry.name) for entry in inputs], log


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("train/b.jsonl", "train/a.jsonl.zst", "train/deep/c.parquet", "train/README.md", "val.jsonl", "x.txt"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "raw"


def test_files_folders_and_globs(raw: Path) -> None:
    everything = [("train", "a.jsonl.zst"), ("train", "b.jsonl"), ("train", "deep/c.parquet")]
    assert find([f"{raw}/train"])[0] == everything
    assert find([f"{raw}/train/**/*.*"])[0] == everything
    assert find([f"{raw}/train/b.jsonl", f"{raw}/train/*.zst"])[0] == everything[:2]
    found, log = find([f"{raw}/train/*"])
    assert found == everything
    assert "1 files are not" in log[0]
    found, _ = find([f"{raw}/train/*.jsonl", f"validation={raw}/val.jsonl", f"{raw}/x.txt"], "test")
    assert found == [("test", "train/b.jsonl"), ("validation", "val.jsonl"), ("test", "x.txt")]


def test_a_file_named_twice_is_read_once(raw: Path) -> None:
    assert find([f"{raw}/val.jsonl", f"{raw}/*.jsonl", f"{raw}/train/../val.jsonl"])[0] == [("train", "val.jsonl")]
    with pytest.raises(ValueError, match=r"--input validation=.*val\.jsonl is already an input of the train split"):
        find([f"{raw}/val.jsonl", f"validation={raw}/val.jsonl"])


@pytest.mark.parametrize("pattern", ["no", "no*", "train/README.md", "train/*.md"])
def test_nothing_found(raw: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"--input .*(no such file|not a file of a supported kind)"):
        find([f"{raw}/{pattern}"])


@pytest.mark.parametrize("pattern", ["", "train="])
def test_an_empty_name_is_not_the_current_folder(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"--input '{pattern}': names no file or folder"):
        find([pattern])


@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 50)), max_size=40), st.integers(1, 100))
def test_groups_hold_each_input_once_in_order(sizes: list[tuple[Split, int]], limit: int) -> None:
    inputs = [Input(split, f"{number:03d}", size) for number, (split, size) in enumerate(sizes)]
    groups = group_inputs(inputs, limit)
    assert [group.number for group in groups] == list(range(len(groups)))
    for split in SPLITS:
        grouped = [entry for group in groups if group.split == split for entry in group.inputs]
        assert grouped == [entry for entry in inputs if entry.split == split]
    for group, after in pairwise(groups):
        assert group.size <= limit or len(group.inputs) == 1
        if group.split == after.split:  # no group could have taken one more
            assert group.size + after.inputs[0].size > limit


@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 50), st.booleans()), max_size=10))
def test_a_plan_is_read_as_it_was_written(entries: list[tuple[Split, int, bool]]) -> None:
    hub = HubText("NAME", None, "main", "train", 1, 3)
    inputs = [Input(split, f"{n}", size, hub if is_hub else None) for n, (split, size, is_hub) in enumerate(entries)]
    job = Job(
        JOB_VERSION, JobSettings("t", "l", "0", 0, 1, 1, 1, 0.1, "skip", 0.2), {"a": "1"}, group_inputs(inputs, 60)
    )
    assert Job.from_json(job.to_json()) == job


def test_each_size_is_looked_at_a_few_times_only() -> None:
    """A group may have a million small files: what it holds so far must not be added up for each of them."""
    looked_at = 0

    class Counted(Input):
        def __getattribute__(self, name: str) -> object:
            nonlocal looked_at
            looked_at += name == "size"
            return super().__getattribute__(name)

    inputs = [Counted("train", f"{number:05d}.txt", 10) for number in range(1000)]
    assert len(group_inputs(inputs, 1 << 30)) == 1
    assert looked_at <= 5 * len(inputs)


def test_each_part_of_a_dataset_of_the_hub_is_a_group(tmp_path: Path) -> None:
    """Their sizes are not known; together they would be one worker's."""
    parts = [Input("train", f"part {n}", 0, HubText("NAME", None, "main", "train", n, 3)) for n in range(3)]
    groups = group_inputs([Input("train", "a", 5), Input("train", "b", 5), *parts], 1 << 30)
    assert [[entry.name for entry in group.inputs] for group in groups] == [
        ["a", "b"], ["part 0"], ["part 1"], ["part 2"],
    ]  # fmt: skip


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def without(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    if not links:
        monkeypatch.setattr("mamba_train.data.shard_job.os.link", without)
    path = tmp_path / "job.json"
    create_once(path, b"first")
    assert path.read_bytes() == b"first"
    if links:
        create_once(path, b"second")
        assert path.read_bytes() == b"first", "what another process wrote before stays"
    assert list(tmp_path.iterdir()) == [path]


def test_the_number_of_groups_stays_sane() -> None:
    inputs = [Input("train", f"{number:05d}.jsonl.zst", 15_000_000) for number in range(59_166)]
    assert len(group_inputs(inputs, 1 << 30)) == 834


@given(st.sets(st.text(max_size=100), max_size=20))
def test_every_label_has_a_folder_of_its_own(labels: set[str]) -> None:
    assert len({label_folder(label) for label in labels}) == len(labels)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100))
def test_a_label_is_never_a_path(label: str) -> None:
    folder = label_folder(label)
    assert "/" not in folder
    assert not folder.startswith(".") or folder.count(".") == 1
    assert folder not in (".", "..")
