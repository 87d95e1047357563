"""Which tokens are in a step of a stream depends on config and seed alone: compared with its definition."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from mamba_train.data.position import restore
from mamba_train.data.stream_loader import StreamLoader
from mamba_train.data.tokenizer import load_tokenizer
from tests.data.rank_process import fed
from tests.data.stream_order import (
    BATCH,
    Files,
    expected_steps,
    gathered,
    mixed,
    rows_of,
    spec_of,
)
from tests.data.streams import make_stream, steps_of, write_files


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
