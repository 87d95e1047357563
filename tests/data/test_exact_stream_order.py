"""Which tokens are in a step of a stream depends on config and seed alone.

The order is compared with its definition, written down here without lanes that remember anything; then real loader
processes are killed (SIGKILL) and started again with another world size, other workers and other micro-batches.
"""

import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_train.data.batches import IGNORE_INDEX
from mamba_train.data.lanes import LaneOrder
from mamba_train.data.mixture import Mixture, Stage
from mamba_train.data.position import restore, state_of
from mamba_train.data.stream_loader import StreamLoader
from mamba_train.data.streams import StreamSource
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from tests.data.digests import digest
from tests.data.pile_documents import stdlib_documents
from tests.data.rank_process import SAVE_INTERVAL, fed
from tests.data.streams import make_stream, steps_of, write_files, write_tokenizer
from tests.helpers import REPOSITORY

BATCH = 12
LENGTH = 32
Files = list[list[str]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents, small ones."""
    return [text[:600] for found in stdlib_documents().values() for text in found][:700]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path, texts[::5])
    return path


def spec_of(folder: Path, tokenizer: Path, **data: Any) -> dict[str, Any]:
    settings = {"tokenizer": str(tokenizer), "cache_dir": str(folder.parent / "cache"), **data}
    if "sources" not in settings:
        settings["path"] = str(folder)
    return {"data": settings, "length": LENGTH, "global_batch_size": BATCH, "seed": 5}


def documents_of(files: Files, order: LaneOrder, lane: int, repeat: bool) -> Iterator[str]:
    """The texts of a lane, by the definition of its order."""
    for epoch in itertools.count() if repeat else [0]:
        for piece in order.pieces(lane, epoch):
            mine = dict(enumerate(files[piece.file][piece.residue :: piece.stride]))
            for block in range(-(-len(mine) // order.block)):
                yield from (mine[i] for i in order.documents(piece, epoch, block) if mine.get(i, "").strip())


def windows_of(
    files: Files, order: LaneOrder, lane: int, repeat: bool, tokenizer: TextTokenizer
) -> Iterator[list[int]]:
    tokens: list[int] = []
    for text in documents_of(files, order, lane, repeat):
        tokens += [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        while len(tokens) > LENGTH:
            yield tokens[: LENGTH + 1]
            tokens = tokens[LENGTH:]
    if len(tokens) > 1:
        yield tokens


def expected_steps(spec: dict[str, Any], sources: dict[str, Files]) -> Iterator[list[list[int]]]:
    """The rows of each global batch by the definition; an empty row where a lane has ended."""
    data, tokenizer = spec["data"], load_tokenizer(spec["data"]["tokenizer"])
    n_lanes, repeat = data.get("lanes") or BATCH, data.get("repeat", True)
    stages = data.get("mixture") or [{"from_step": 0, "weights": {"": 1.0}}]
    mixture = Mixture([Stage(s["from_step"], s["from_step"] * BATCH, s["weights"]) for s in stages], spec["seed"])
    lanes = {
        (name, lane): windows_of(
            files,
            LaneOrder(
                spec["seed"], name, len(files), n_lanes, data.get("shuffle_files", False),
                data.get("shuffle_documents") or 1,
            ),
            lane, repeat, tokenizer,
        )
        for name, files in sources.items() for lane in range(n_lanes)
    }  # fmt: skip
    for step in itertools.count():
        samples = np.arange(step * BATCH, (step + 1) * BATCH)
        numbers, _ = mixture.locate(samples)
        yield [
            next(lanes[mixture.names[number], sample % n_lanes], [])
            for number, sample in zip(numbers.tolist(), samples.tolist(), strict=True)
        ]


def rows_of(batches: list[Any]) -> list[list[int]]:
    """The tokens of each row, without padding."""
    found = []
    for batch in batches:
        lengths = [LENGTH + 1] * len(batch.tokens) if batch.lengths is None else batch.lengths.tolist()
        found += [row[:n] for row, n in zip(batch.tokens.tolist(), lengths, strict=True)]
    return found


def corpora(texts: list[str]) -> dict[str, Files]:
    return {
        "one file": [texts[:100]],
        "fewer files than ranks": [texts[:90], texts[90:180]],
        "files that do not divide": [texts[i * 20 : (i + 1) * 20] for i in range(17)],
        "one huge document": [["".join(texts[:150])], *(texts[150 + i * 5 :: 40] for i in range(8))],
        "empty documents": [[text if i % 5 else " " for i, text in enumerate(texts[:150])], [], texts[200:260]],
    }


CORPORA = ["one file", "fewer files than ranks", "files that do not divide", "one huge document", "empty documents"]


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("repeat", [True, False])
def test_the_order_is_its_definition_at_every_world_size(
    name: str, repeat: bool, texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    files = corpora(texts)[name]
    if repeat:  # each lane needs a document
        files = [found for found in files if found]
    folder = write_files(tmp_path / "text", files)
    skips = {"bad_documents": "skip", "max_bad_share": 1.0} if name == "empty documents" else {}
    spec = spec_of(folder, tokenizer_path, repeat=repeat, shuffle_files=True, shuffle_documents=8, **skips)
    expected = list(itertools.islice(expected_steps(spec, {"": files}), 40))
    for world_size, micro in ((1, 12), (2, 3), (3, 2), (4, 1), (6, 2)):
        found = list(itertools.islice(steps_of(spec, world_size, micro=micro), 40))
        assert [rows_of(batches) for batches in found] == expected


@pytest.mark.parametrize("name", CORPORA)
def test_without_repetition_each_document_comes_once(
    name: str, texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    files = corpora(texts)[name]
    folder = write_files(tmp_path / "text", files)
    skips = {"bad_documents": "skip", "max_bad_share": 1.0} if name == "empty documents" else {}
    spec = spec_of(folder, tokenizer_path, repeat=False, **skips)
    lanes: list[list[int]] = [[] for _ in range(BATCH)]
    n_targets = 0
    for batches in steps_of(spec, 3, micro=2):
        here = sum(batch.n_targets for batch in batches)
        for lane, row in zip(lanes, rows_of(batches), strict=True):
            lane += row[1:] if lane else row
        n_targets += here
        if not here:
            break
    tokenizer = load_tokenizer(tokenizer_path)
    found = Counter()
    for lane in lanes:
        ends = [i for i, token in enumerate(lane) if token == tokenizer.eos_id]
        found.update(tuple(lane[start + 1 : end]) for start, end in zip([-1, *ends], ends, strict=False))
    everything = [text for texts_of_file in files for text in texts_of_file if text.strip()]
    assert found == Counter(tuple(tokenizer.encode(text).tolist()) for text in everything)
    n_documents, n_tokens = len(everything), sum(len(lane) for lane in lanes)
    # Every token but the first of a lane, and but the first of a document, which is masked.
    assert n_targets == n_tokens - n_documents


def mixed(texts: list[str], folder: Path, tokenizer: Path) -> tuple[dict[str, Any], dict[str, Files]]:
    """Three sources, one of them rare, in two stages; more lanes than rows."""
    sources = {
        "a": [texts[i::7][:40] for i in range(7)],
        "b": [texts[100:180], texts[180:300]],
        "c": [texts[300:500]],
    }
    places = {name: str(write_files(folder / name, files, f)) for (name, files), f in zip(
        sources.items(), (".jsonl.zst", ".jsonl.gz", ".jsonl"), strict=True)}  # fmt: skip
    stages = [
        {"from_step": 0, "weights": {"a": 0.7, "b": 0.299, "c": 0.001}},
        {"from_step": 23, "weights": {"b": 1.0, "c": 2.0}},
    ]
    spec = spec_of(
        folder / "text", tokenizer, sources=places, mixture=stages, lanes=2 * BATCH, shuffle_files=True,
        shuffle_documents=16,
    )  # fmt: skip
    return spec, sources


def test_a_mixture_is_exact_and_in_lanes_of_its_own(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec, sources = mixed(texts, tmp_path, tokenizer_path)
    expected = list(itertools.islice(expected_steps(spec, sources), 50))
    for world_size in (1, 4, 6):
        found = itertools.islice(steps_of(spec, world_size), 50)
        assert [rows_of(batches) for batches in found] == expected


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_make_no_difference(workers: int, texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    expected = list(itertools.islice(steps_of(spec), 30))
    found = list(itertools.islice(steps_of(spec, 2, workers, micro=3), 30))
    assert [rows_of(batches) for batches in found] == [rows_of(batches) for batches in expected]
    # All that a model gets, boundaries and masks included.
    assert all(torch.equal(fed(mine), fed(theirs)) for mine, theirs in zip(found, expected, strict=True))


def _keep(tables: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    tables.append(table)
    return table


def test_it_goes_on_from_each_state_twice_in_a_row(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    expected = [rows_of(batches) for batches in itertools.islice(steps_of(spec), 60)]
    generator, step, state = random.Random(1), 0, None
    sizes = []
    while step < 60:
        world_size = generator.choice([1, 2, 3, 4, 6])
        sources = [make_stream(spec) for _ in range(world_size)]
        if state is not None:
            for source in sources:
                assert restore(source, json.loads(state), step, allow_changed=False) == []
        loaders = [StreamLoader(source, rank, world_size, 1) for rank, source in enumerate(sources)]
        for _ in range(generator.randint(1, 9)):
            if step < 60:
                found = [batch for loader in loaders for batch in loader.step(step * BATCH)]
                assert rows_of(found) == expected[step]
                step += 1
        state = json.dumps(gathered(sources, step * BATCH))
        sizes.append(len(state))
    assert max(sizes) < min(sizes) + 400  # digits, not entries


def gathered(sources: list[StreamSource], samples: int) -> dict[str, Any]:
    """The state that the ranks have together."""
    tables: list[torch.Tensor] = []
    for rank, source in enumerate(sources):
        source.gather(rank, len(sources), functools.partial(_keep, tables))
    sources[0].cursors = sum(tables).numpy()
    return state_of(sources[0], samples)


def test_the_batch_size_may_change(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    """Also to one that the samples so far are no multiple of, so that rows begin at other lanes."""
    folder = write_files(tmp_path / "text", [texts[i::7] for i in range(7)])
    spec = spec_of(folder, tokenizer_path, lanes=24)
    expected = [row for batches in itertools.islice(steps_of(spec), 30) for row in rows_of(batches)]
    samples, state = 0, None
    for batch_size, world_size in ((12, 2), (8, 4), (24, 3), (8, 1), (6, 2)):
        sources = [make_stream({**spec, "global_batch_size": batch_size}) for _ in range(world_size)]
        for source in sources if state is not None else []:
            restore(source, json.loads(json.dumps(state)), 5, allow_changed=False)
        loaders = [StreamLoader(source, rank, world_size, 1) for rank, source in enumerate(sources)]
        for _ in range(3):
            found = rows_of([batch for loader in loaders for batch in loader.step(samples)])
            assert found == expected[samples : samples + batch_size]
            samples += batch_size
        state = gathered(sources, samples)


def test_a_lane_without_a_document_is_refused_where_it_repeats(
    texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts[:11]]), tokenizer_path)
    with pytest.raises(ValueError, match=r"lane 11 finds no document of its own in .*000.jsonl.zst: there are fewer"):
        next(steps_of(spec))


def test_skipped_samples_are_read_and_dropped(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec = spec_of(write_files(tmp_path / "text", [texts]), tokenizer_path)
    expected = [rows_of(batches) for batches in itertools.islice(steps_of(spec), 10)]
    loader = StreamLoader(make_stream(spec), 0, 1, 12)
    assert rows_of(loader.step(0)) == expected[0]
    assert rows_of(loader.step(7 * BATCH)) == expected[7]
    with pytest.raises(ValueError, match="cannot go back"):
        loader.step(0)


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


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run: on how many ranks, with how many workers each, in micro-batches of how many rows."""

    world_size: int
    workers: int
    micro_batch_size: int


def launch(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> list[subprocess.Popen]:
    output.mkdir(exist_ok=True)
    number = len(list(output.glob("spec-*")))
    path = output / f"spec-{number}.json"
    places = {"output": str(output), "rendezvous": str(output / f"rendezvous-{number}"), "swap": swap}
    path.write_text(json.dumps({**spec, **dataclasses.asdict(start), **places}))
    script = str(Path(__file__).with_name("stream_process.py"))
    return [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(path)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=(output / f"errors-{number}-{rank}.txt").open("w"),
        )
        for rank in range(start.world_size)
    ]


def records(output: Path) -> list[dict[str, Any]]:
    path = output / "steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_until_killed(spec: dict[str, Any], start: Start, output: Path, step: int) -> None:
    n_before = len(records(output))
    ranks = launch(spec, start, output)
    while not any(record["step"] >= step for record in records(output)[n_before:]):
        assert all(rank.poll() is None for rank in ranks), errors(output)
        time.sleep(0.002)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        assert rank.wait() == -signal.SIGKILL


def errors(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.glob("errors-*")))


def run_to_the_end(spec: dict[str, Any], start: Start, output: Path, swap: bool = False) -> None:
    for rank in launch(spec, start, output, swap):
        assert rank.wait(timeout=120) == 0, errors(output)


STARTS = [
    [Start(2, 1, 3), Start(3, 0, 4), Start(1, 3, 6)],
    [Start(6, 0, 1), Start(4, 1, 3), Start(2, 3, 2)],
    [Start(1, 1, 12), Start(6, 0, 2), Start(3, 1, 1)],
]


@pytest.mark.slow
@pytest.mark.parametrize("starts", STARTS, ids=lambda starts: "-".join(str(start.world_size) for start in starts))
def test_killed_twice_and_restarted_with_another_world_size(
    texts: list[str], tokenizer_path: Path, tmp_path: Path, starts: list[Start]
) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    spec["total_steps"] = 60
    expected = [digest(fed(batches)) for batches in itertools.islice(steps_of(spec), 60)]
    output, generator, step = tmp_path / "run", random.Random(str(starts)), 0
    for start in starts[:-1]:
        step += generator.randint(SAVE_INTERVAL + 2, 20)
        run_until_killed(spec, start, output, step)
    run_to_the_end(spec, starts[-1], output)
    done = records(output)
    assert [record["digest"] for record in done] == [expected[record["step"] - 1] for record in done]
    assert {record["step"] for record in done} == set(range(1, 61))
    assert {record["world_size"] for record in done} == {start.world_size for start in starts}


@pytest.mark.slow
def test_swapped_ranks_are_noticed(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    spec, _ = mixed(texts, tmp_path, tokenizer_path)
    spec["total_steps"] = 3
    expected = [digest(fed(batches)) for batches in itertools.islice(steps_of(spec), 3)]
    run_to_the_end(spec, Start(2, 0, 3), tmp_path / "run", swap=True)
    found = [record["digest"] for record in records(tmp_path / "run")]
    assert len(found) == 3
    assert all(mine != theirs for mine, theirs in zip(found, expected, strict=True))
