"""Whose job a folder of shards is, and what of the plan may change when the command is given again."""

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_train.data.manifest import read_manifest
from mamba_train.data.shard_folder import adopt_folder
from mamba_train.data.shard_job import JOB_NAME, JOB_VERSION, Job, JobSettings
from mamba_train.data.tokenizer import dna_tokenizer
from mamba_train.data.verification import plan_problems
from tests.data_prep.conftest import make_rows, write_rows
from tests.data_prep.helpers import contents, make_shards


def test_tasks_that_begin_at_the_same_moment_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one makes the folder that of the job just when this one has found no job.json."""
    tokenizer = dna_tokenizer()
    settings = JobSettings("text", None, tokenizer.sha256, 0, 17, 1, 1, 0.0, "error", 0.0)
    job = Job(JOB_VERSION, settings, {}, ())
    folder = tmp_path / "out"
    folder.mkdir()
    exists = Path.exists
    n_asked = 0

    def overtaken(path: Path) -> bool:
        nonlocal n_asked
        found = exists(path)
        if path.name == JOB_NAME:
            n_asked += 1
            if n_asked == 1:
                adopt_folder(folder, job, tokenizer, print)
        return found

    monkeypatch.setattr(Path, "exists", overtaken)
    adopt_folder(folder, job, tokenizer, print)
    assert n_asked > 1
    assert sorted(path.name for path in folder.iterdir()) == [JOB_NAME, "tokenizer.json"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    tokenizer = dna_tokenizer()
    settings = JobSettings("text", None, tokenizer.sha256, 0, 17, 1, 1, 0.0, "error", 0.0)
    with pytest.raises(ValueError, match=r"--output .*out: cannot be made \(File exists\)"):
        adopt_folder(tmp_path / "out", Job(JOB_VERSION, settings, {}, ()), tokenizer, print)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files; the second has a line that is no document among fifty that are."""
    for number in range(3):
        write_rows(tmp_path / "raw" / f"{number}.jsonl", make_rows(50, number))
    with (tmp_path / "raw" / "1.jsonl").open("a") as stream:
        stream.write("not json\n")
    return tmp_path / "raw"


def begin_and_fail(corpus: Path, folder: Path, tokenizer_file: Path, problem: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=problem):
        make_shards([str(corpus)], folder, tokenizer_file, **options)
    assert [path.stem for path in (folder / "groups").iterdir()] == ["train-00000"]


def test_what_the_message_advises_goes_on_in_the_folder_begun(
    corpus: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    folder, skip = tmp_path / "out", {"bad_documents": "skip", "max_bad_share": 0.1}
    begin_and_fail(corpus, folder, tokenizer_file, "--bad-documents=skip leaves such documents out")
    begin_and_fail(corpus, folder, tokenizer_file, "allow a larger share", bad_documents="skip")
    kept = (folder / "groups" / "train-00000.json").stat().st_mtime_ns
    log: list[str] = []
    assert make_shards([str(corpus)], folder, tokenizer_file, log, **skip) is not None
    assert f"--output {folder}: goes on with max_bad_share=0.1, begun with 0.01" in log
    assert (folder / "groups" / "train-00000.json").stat().st_mtime_ns == kept
    # The folder is what the same command makes of an empty one.
    make_shards([str(corpus)], tmp_path / "fresh", tokenizer_file, **skip)
    assert contents(folder) == contents(tmp_path / "fresh")
    assert not list(plan_problems(folder, read_manifest(folder)))


@pytest.mark.parametrize("changes", [{}, {"bad_documents": "skip", "max_bad_share": 0.05}])
def test_what_was_left_out_is_not_forgotten(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "out"
    make_shards([str(corpus)], folder, tokenizer_file, bad_documents="skip", max_bad_share=0.1)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"begun with other inputs or settings \(settings\.(bad_doc|max_bad_share)"):
        make_shards([str(corpus)], folder, tokenizer_file, **changes)
    assert contents(folder) == before


def test_a_repaired_input_goes_on_in_the_folder_begun(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "out"
    begin_and_fail(corpus, folder, tokenizer_file, "invalid JSON")
    write_rows(corpus / "1.jsonl", make_rows(50, 1))
    log: list[str] = []
    assert make_shards([str(corpus)], folder, tokenizer_file, log) is not None
    assert any("goes on with 1.jsonl of " in line for line in log)
    make_shards([str(corpus)], tmp_path / "fresh", tokenizer_file)
    assert contents(folder) == contents(tmp_path / "fresh")


def test_an_input_that_shards_were_made_of_may_not_change(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "out"
    begin_and_fail(corpus, folder, tokenizer_file, "invalid JSON")
    write_rows(corpus / "0.jsonl", make_rows(49, 0))
    with pytest.raises(ValueError, match=r"\(groups\.0\.inputs\.0\.size: \d+ there, \d+ here\)"):
        make_shards([str(corpus)], folder, tokenizer_file)


def test_a_folder_in_which_nothing_is_finished_may_go(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(ValueError, match=r"no field 'meta\.nope'"):
        make_shards([str(corpus)], tmp_path / "out", tokenizer_file, label_key="meta.nope")
    with pytest.raises(ValueError, match=", or remove this one: no group is finished"):
        make_shards([str(corpus)], tmp_path / "out", tokenizer_file)


def test_a_plan_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / JOB_NAME).write_text(json.dumps({"job_version": 1}))
    tokenizer = dna_tokenizer()
    settings = JobSettings("text", None, tokenizer.sha256, 0, 17, 1, 1, 0.0, "error", 0.0)
    with pytest.raises(ValueError, match=rf"{JOB_NAME}: not a readable plan"):
        adopt_folder(tmp_path, Job(JOB_VERSION, settings, {}, ()), tokenizer, print)
