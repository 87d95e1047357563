"""Which tokens are in a step depends on config and seed alone: real loader processes, killed and restarted.

Ranks with workers of their own load a mixture of real documents in the Pile's form, are killed (SIGKILL) at random
steps and started again with another world size, other workers and another micro-batch. What all ranks of a step would
feed to a model must be what the pure function says, in one process and without a loader.
"""

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_train.data.tokenizer import train_tokenizer
from tests.data.digests import digest
from tests.data.folders import write_text_folder
from tests.data.loader_ranks import Start, records, run_to_the_end, run_until_killed
from tests.data.pile_documents import pile_file, read_pile
from tests.data.rank_process import SAVE_INTERVAL, fed, make_source
from tests.helpers import REPOSITORY

TOTAL_STEPS = 90
GLOBAL_BATCH_SIZE = 48  # divides by 1, 2, 3 and 4
STAGE_STEPS = (0, 50, 71)  # the first is longer than a block of 2,048 samples; none of them ends with one


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A corpus of real documents by domain, several shards each, and a mixture that changes twice."""
    folder = tmp_path_factory.mktemp("pile")
    materials = Path(os.environ.get("MAMBA_TRAIN_MATERIALS", REPOSITORY.parent / "shared" / "materials"))
    documents = read_pile(pile_file(folder, materials))
    assert sum(len(texts) for texts in documents.values()) >= 1000
    assert len(documents) >= 3
    tokenizer = train_tokenizer([text for texts in documents.values() for text in texts[::5]], 700)
    groups = [(label, texts[first::2]) for first in (0, 1) for label, texts in documents.items()]
    write_text_folder(folder / "tokens", {"train": groups}, tokenizer)
    rare, *others = sorted(documents, key=lambda label: sum(map(len, documents[label])))
    first = {f"pile/{label}": 1.0 + number for number, label in enumerate(others)}
    # The smallest domain is read more than once, so that epochs end inside the run.
    weights = [{**first, f"pile/{rare}": 9.0}, {f"pile/{rare}": 0.001, f"pile/{others[0]}": 0.999}, first]
    return {
        "folder": str(folder / "tokens"),
        "stages": list(zip(STAGE_STEPS, weights, strict=True)),
        "length": 64,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "seed": 11,
        "total_steps": TOTAL_STEPS,
    }


@pytest.fixture(scope="module")
def expected(spec: dict[str, Any]) -> list[str]:
    """The digest of each step, from one process that computes each step for itself."""
    source = make_source(spec)
    assert max(source.epochs(TOTAL_STEPS * GLOBAL_BATCH_SIZE).values()) > 1.5
    steps = [fed([source.batch(step * GLOBAL_BATCH_SIZE, slice(None))]) for step in range(TOTAL_STEPS)]
    assert any(bool((tokens == -100).any()) for tokens in steps), "documents end inside of windows"
    found = [digest(tokens) for tokens in steps]
    assert len(set(found)) == TOTAL_STEPS
    return found


STARTS = [
    [Start(2, 1, 8), Start(3, 0, 16), Start(1, 2, 6)],
    [Start(1, 2, 48), Start(4, 0, 4), Start(2, 1, 3)],
    [Start(3, 1, 4), Start(1, 0, 12), Start(4, 1, 12)],
    [Start(4, 0, 6), Start(2, 2, 12), Start(3, 0, 2)],
]


@pytest.mark.parametrize(
    "starts",
    [STARTS[0], *(pytest.param(starts, marks=pytest.mark.slow) for starts in STARTS[1:])],
    ids=lambda starts: "-".join(str(start.world_size) for start in starts),
)
def test_killed_twice_and_restarted_with_another_world_size(
    spec: dict[str, Any], expected: list[str], tmp_path: Path, starts: list[Start]
) -> None:
    assert all(first.world_size != second.world_size for first, second in pairwise(starts))
    output = tmp_path / "run"
    generator = random.Random(str(starts))
    step = 0
    for start in starts[:-1]:
        step += generator.randint(SAVE_INTERVAL + 2, TOTAL_STEPS // 3)
        run_until_killed(spec, start, output, step)
    run_to_the_end(spec, starts[-1], output)

    done = records(output)
    assert [record["digest"] for record in done] == [expected[record["step"] - 1] for record in done]
    assert {record["step"] for record in done} == set(range(1, TOTAL_STEPS + 1))
    assert {record["world_size"] for record in done} == {start.world_size for start in starts}


def test_swapped_ranks_are_noticed(spec: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    run_to_the_end({**spec, "total_steps": 3}, Start(2, 0, 8), tmp_path / "run", swap=True)
    done = records(tmp_path / "run")
    assert len(done) == 3
    assert all(record["digest"] != expected[record["step"] - 1] for record in done)


def test_an_epoch_of_each_domain_has_each_window_once(spec: dict[str, Any]) -> None:
    """Through stages and blocks that are cut short."""
    source = make_source(spec)
    samples = np.arange(40_000)
    sources, windows = source.windows(samples)
    complete = 0
    for number, n_windows in enumerate(source.n_windows.tolist()):
        mine = windows[sources == number]
        for first in range(0, len(mine) - n_windows + 1, n_windows):
            epoch = mine[first : first + n_windows]
            assert np.array_equal(np.sort(epoch), np.arange(n_windows))
            complete += 1
        rest = mine[len(mine) // n_windows * n_windows :]
        assert len(set(rest.tolist())) == len(rest)
    assert complete > len(source.names)
