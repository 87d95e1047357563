"""What lanes do besides the order: what they count, refuse, and say of themselves."""

import errno
import functools
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_train.config_data import BadDocuments
from mamba_train.data import shard_job
from mamba_train.data.batches import IGNORE_INDEX, WindowForm
from mamba_train.data.lanes import LaneOrder
from mamba_train.data.position import restore, state_of
from mamba_train.data.stream_loader import RankRows, StreamLoader
from mamba_train.data.streams import StreamSource
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from tests.data.rank_process import fed
from tests.data.stream_order import (
    BATCH,
    LENGTH,
    Files,
    keep,
    rows_of,
    spec_of,
)
from tests.data.streams import make_stream, steps_of, write_files


def test_a_lane_without_a_document_is_refused_where_it_repeats(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts[:11]]), tokenizer_path)
    with pytest.raises(ValueError, match=r"lane 11 finds no document of its own in .*000.jsonl.zst: it is empty, or"):
        next(steps_of(spec))


def test_skipped_samples_are_read_and_dropped(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts]), tokenizer_path)
    expected = [rows_of(batches) for batches in itertools.islice(steps_of(spec), 10)]
    loader = StreamLoader(make_stream(spec), 0, 1, 12)
    assert rows_of(loader.step(0)) == expected[0]
    assert rows_of(loader.step(7 * BATCH)) == expected[7]
    with pytest.raises(ValueError, match="cannot go back"):
        loader.step(0)
    restore(loader.source, json.loads(json.dumps(state_of(make_stream(spec), 0))), 0, allow_changed=False)
    assert rows_of(loader.step(0)) == expected[0]


def test_a_dataset_has_the_order_of_its_files(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    """Streamed by the library `datasets`, without its shuffle, and gone on with in the middle."""
    pytest.importorskip("datasets")
    folder = write_files(tmp_path / "text", [texts[i * 30 : (i + 1) * 30] for i in range(5)], ".jsonl")
    expected = [rows_of(b) for b in itertools.islice(steps_of(spec_of(folder, tokenizer_path)), 25)]
    spec = spec_of(folder, tokenizer_path)
    spec["data"]["path"] = f"hf:{folder}"
    sources = [make_stream(spec), make_stream(spec)]
    assert len(sources[0].files[""]) == 5
    for source, steps in zip(sources, (range(11), range(11, 25)), strict=True):
        if steps.start:
            restore(source, json.loads(json.dumps(state_of(sources[0], steps.start * BATCH))), steps.start, False)
        loader = StreamLoader(source, 0, 1, BATCH)
        assert [rows_of(loader.step(step * BATCH)) for step in steps] == expected[steps.start : steps.stop]


def test_lanes_continue(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts]), tokenizer_path, continue_lanes=True)
    steps = [rows_of(batches) for batches in itertools.islice(steps_of(spec), 20)]
    for before, after in itertools.pairwise(steps):
        assert [row[-1] for row in before] == [row[0] for row in after]


def test_other_files_or_lanes_are_refused(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text", [texts[:60], texts[60:120]])
    spec = spec_of(folder, tokenizer_path)
    source = make_stream(spec)
    StreamLoader(source, 0, 1, 12).step(0)
    state = json.loads(json.dumps(state_of(source, BATCH)))
    more = make_stream(spec_of(folder, tokenizer_path, lanes=24))
    with pytest.raises(ValueError, match=r"data.lanes=24: the checkpoint was trained with 12; set data.lanes=12"):
        restore(more, state, 1, allow_changed=False)
    write_files(folder, [texts[:61], texts[60:120]])
    with pytest.raises(ValueError, match="are not the checkpoint's, so its places"):
        restore(make_stream(spec), state, 1, allow_changed=True)


def test_a_run_that_a_bad_document_has_stopped_goes_on_without_it(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = write_files(tmp_path / "text", [[*texts[:70], " ", *texts[:5]] for _ in range(BATCH)])
    n_steps, strict = 600, spec_of(folder, tokenizer_path)
    skipping = spec_of(folder, tokenizer_path, bad_documents="skip", max_bad_share=0.1)
    expected = [rows_of(batches) for batches in itertools.islice(steps_of(skipping), n_steps)]
    source = make_stream(strict)
    loader, states = StreamLoader(source, 0, 1, BATCH), []

    def read() -> None:
        for step in range(n_steps):
            states.append(json.loads(json.dumps(state_of(source, step * BATCH))))
            loader.step(step * BATCH)

    with pytest.raises(ValueError, match=r"the text is empty; data\.bad_documents=skip leaves such documents out"):
        read()
    assert 5 < len(states) < n_steps
    again = make_stream(skipping)
    restore(again, states[-1], len(states) - 1, allow_changed=False)
    loader = StreamLoader(again, 0, 1, BATCH)
    for step in range(len(states) - 1, n_steps):
        assert rows_of(loader.step(step * BATCH)) == expected[step]


def test_a_checkpoint_whose_fingerprint_holds_the_policy_is_known(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    """As older ones do."""
    spec = spec_of(write_files(tmp_path / "text", [texts]), tokenizer_path, bad_documents="skip")
    state = state_of(make_stream(spec), 0)
    state["fingerprints"][""] = make_stream(spec)._fingerprint("", BadDocuments.skip)[:16]
    restore(make_stream(spec), state, 1, allow_changed=False)


def test_a_restart_near_the_end_of_a_file_does_not_judge_by_its_rest(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    """Few documents are left there, and a bad one among them is a large share of them."""
    files = [[*texts[i * 30 : (i + 1) * 30], " "] for i in range(BATCH)]
    folder = write_files(tmp_path / "text", files)
    spec = spec_of(folder, tokenizer_path, bad_documents="skip", max_bad_share=0.1, repeat=False)
    expected = [rows_of(batches) for batches in itertools.islice(steps_of(spec), 150)]
    last = max(step for step, rows in enumerate(expected) if all(len(row) == LENGTH + 1 for row in rows))
    source = make_stream(spec)
    loader = StreamLoader(source, 0, 1, BATCH)
    for step in range(last):
        loader.step(step * BATCH)
    again = make_stream(spec)
    restore(again, json.loads(json.dumps(state_of(source, last * BATCH))), last, allow_changed=False)
    loader = StreamLoader(again, 0, 1, BATCH)
    n_left_out = 0
    for step in range(last, 150):
        assert rows_of(loader.step(step * BATCH)) == expected[step]
        n_left_out += loader.counts[1]
    assert 0 < n_left_out <= BATCH


def test_the_bytes_that_are_counted_are_those_of_the_targets(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    texts = [text for text in texts if text.isascii()]
    spec = spec_of(write_files(tmp_path / "text", [texts[i::9] for i in range(9)]), tokenizer_path, repeat=False)
    tokenizer = load_tokenizer(tokenizer_path)
    loader = StreamLoader(make_stream(spec), 0, 1, BATCH)
    for step in itertools.count():
        batches = loader.step(step * BATCH)
        targets = torch.cat([batch.targets for batch in batches])
        targets = targets[(targets != IGNORE_INDEX) & (targets != tokenizer.eos_id)]
        assert loader.counts[0] == len("".join(tokenizer.decode([target]) for target in targets.tolist()))
        if not len(targets):
            break
    assert step > 10


@pytest.mark.parametrize(("micro", "mask_loss"), [(1, True), (3, True), (12, False)])
def test_the_rows_of_several_processes_are_those_of_one(
    micro: int, mask_loss: bool, texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    """Also where some of them have come to the end of their text and others have not."""
    spec = spec_of(write_files(tmp_path / "text", [texts[i::9] for i in range(9)]), tokenizer_path, repeat=False)
    alone, several = StreamLoader(make_stream(spec), 0, 1, micro), StreamLoader(make_stream(spec), 0, 1, micro)
    several._workers = 5
    for loader in (alone, several):
        loader.source.form = WindowForm(LENGTH, with_boundaries=True, mask_loss=mask_loss)
    parts = RankRows(several.source, 0, 0, 1, 5)
    several._items = map(parts.__getitem__, itertools.count())  # type: ignore[assignment]
    several._next_sample, step, n_full = 0, 0, []
    while not step or n_full[-1]:
        expected, found = alone.step(step * BATCH), several.step(step * BATCH)
        assert all(torch.equal(fed([mine]), fed([theirs])) for mine, theirs in zip(found, expected, strict=True))
        assert [batch.n_targets for batch in found] == [batch.n_targets for batch in expected]
        assert several.counts == alone.counts
        n_full.append(sum(len(row) == LENGTH + 1 for row in rows_of(found)))
        step += 1
    assert {0, BATCH} < set(n_full)


def test_what_documents_mean_is_up_to_the_form(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    """data.reset_state_at_documents and data.mask_loss_at_documents, which no source takes for granted."""
    spec = spec_of(write_files(tmp_path / "text", [[text[:20] for text in texts]]), tokenizer_path)
    source = make_stream(spec)
    (expected,) = StreamLoader(make_stream(spec), 0, 1, BATCH).step(0)
    source.form = WindowForm(LENGTH, with_boundaries=False, mask_loss=False)
    loader = StreamLoader(source, 0, 1, BATCH)
    (found,) = loader.step(0)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.seq_idx is None
    assert found.n_targets == BATCH * LENGTH > expected.n_targets
    assert loader.counts[0] == TextTokenizer(tokenizer_path.read_bytes(), "").n_bytes(found.targets.numpy())


Place = tuple[int, int]  # a file and a line of it


def places_of(files: Files, order: LaneOrder, lane: int, tokenizer: TextTokenizer, n: int) -> list[tuple[Place, int]]:
    """The first n tokens of a lane without repetition: where each is from, and how many pieces were read before it."""
    found: list[tuple[Place, int]] = []
    for number, piece in enumerate(order.pieces(lane, 0)):
        lines = list(range(1, 1 + len(files[piece.file])))[piece.residue :: piece.stride]
        for block in range(-(-len(lines) // order.block)):
            for ordinal in order.documents(piece, 0, block):
                if ordinal < len(lines):
                    text = files[piece.file][lines[ordinal] - 1]
                    found += [((piece.file, lines[ordinal]), number)] * (len(tokenizer.encode(text)) + 1)
    return found[:n]


@pytest.mark.parametrize("settings", [{}, {"shuffle_files": True, "shuffle_documents": 8}], ids=["plain", "shuffled"])
@pytest.mark.parametrize("n_files", [2, 90])
def test_documents_and_epochs_are_those_of_the_definition(
    n_files: int, settings: dict[str, Any], texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    files = [[text[:100] for text in texts[i::n_files]] for i in range(n_files)]
    spec = spec_of(write_files(tmp_path / "text", files), tokenizer_path, **settings)
    tokenizer, order = load_tokenizer(tokenizer_path), make_stream(spec).lane_order("")
    places = [places_of(files, order, lane, tokenizer, 20 * LENGTH) for lane in range(BATCH)]
    loaders = [StreamLoader(make_stream(spec), rank, 3, 2) for rank in range(3)]
    for step in range(15):
        for loader in loaders:
            loader.step(step * BATCH)
        expected: dict[str, list[Any]] = {}
        for lane in places:
            (first, piece), (last, later) = lane[step * LENGTH], lane[(step + 1) * LENGTH]
            begins = first[1] if step else None
            spans: list[Any] = [(first, [begins, last[1]])]
            if piece != later:
                spans = [(first, [begins, None]), (last, [None, last[1]])]
            for (file, _), span in spans:
                expected.setdefault(str(tmp_path / "text" / f"{file:03d}.jsonl.zst"), []).append(span)
        assert documents_of_all(loaders) == expected
        counts = np.sum([loader.counts for loader in loaders], axis=0).tolist()
        n_pieces = len(order.pieces(0, 0))
        n_read = sum(lane[(step + 1) * LENGTH][1] for lane in places)
        assert loaders[0].source.epochs_of(counts[3:]) == {"": n_read / n_pieces / BATCH}
    if n_files > BATCH:
        assert n_read > 0


def documents_of_all(loaders: list[StreamLoader]) -> dict[str, Any]:
    """What `StreamLoader.documents` says when all ranks call it."""
    summed: list[torch.Tensor] = []  # the sums of the two tables, by which ranks see each other
    for number in range(2):
        tables: list[torch.Tensor] = []
        for loader in loaders:
            kept = loader.source.cursors
            loader.source.cursors = (loader._before, kept)[number]
            loader.gather(functools.partial(keep, tables))
            loader.source.cursors = kept
        summed.append(torch.stack(tables).sum(dim=0))
    answers = iter(summed)
    return loaders[0].documents(lambda table: next(answers))


def test_an_epoch_is_one_when_all_is_read(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    files = [texts[i::5] for i in range(5)]
    spec = spec_of(write_files(tmp_path / "text", files), tokenizer_path, repeat=False)
    loader = StreamLoader(make_stream(spec), 0, 1, BATCH)
    step = 0
    while any(batch.n_targets for batch in loader.step(step * BATCH)):
        step += 1
        assert loader.source.epochs_of(loader.counts[3:])[""] <= 1
    assert loader.source.epochs_of(loader.counts[3:]) == {"": 1.0}
    assert loader.documents(lambda table: table) == {}, "nothing was read in the last step"


def test_documents_of_two_sources_are_told_apart_by_the_paths_of_their_files(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    """Files are called alike, and each source knows its own by their names in its folder."""
    folders = {name: write_files(tmp_path / name, [texts[i::3] for i in range(3)]) for name in ("a", "b")}
    sources = {name: str(folder) for name, folder in folders.items()}
    mixture = [{"from_step": 0, "weights": {"a": 1.0, "b": 1.0}}]
    spec = spec_of(folders["a"], tokenizer_path, sources=sources, mixture=mixture)
    loader = StreamLoader(make_stream(spec), 0, 1, BATCH)
    loader.step(0)
    found = loader.documents(lambda table: table)
    assert {Path(name).parent for name in found} == set(folders.values())
    assert sum(map(len, found.values())) == BATCH


def test_files_of_a_source_that_is_new_are_not_said_to_be_rewritten(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    folders = {name: write_files(tmp_path / name, [texts[i::3] for i in range(3)]) for name in ("a", "b")}
    stages = [{"from_step": 0, "weights": {"a": 1.0}}, {"from_step": 9, "weights": {"b": 1.0}}]
    later = time.time() + 60
    for file in folders["b"].iterdir():
        os.utime(file, (later, later))

    def stream(*names: str) -> StreamSource:
        chosen = {name: str(folders[name]) for name in names}
        mixture = stages[: len(names)]
        return make_stream(spec_of(folders["a"], tokenizer_path, sources=chosen, mixture=mixture))

    state = state_of(stream("a"), 2 * BATCH)
    resumed = stream("a", "b")
    restore(resumed, state, 2, allow_changed=False)
    assert resumed.rewritten == []
    for file in folders["a"].iterdir():
        os.utime(file, (later, later))
    resumed = stream("a", "b")
    restore(resumed, state, 2, allow_changed=False)
    assert sorted(resumed.rewritten) == sorted(str(file) for file in folders["a"].iterdir())


def test_a_full_disk_leaves_no_part_of_a_tokenizer(
    texts: list[str], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts[:20]]), tokenizer_path)

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "write_durably", full)
        with pytest.raises(ValueError, match=r"data.cache_dir=.*: cannot be written \(.*No space left"):
            make_stream(spec)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    make_stream(spec)
    (kept,) = (file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert kept.read_bytes() == load_tokenizer(tokenizer_path).serialised
