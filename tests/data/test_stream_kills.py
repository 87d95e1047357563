"""Loader processes of a stream, killed (SIGKILL) and started again on other world sizes, workers and micro-batches."""

import itertools
import random
from pathlib import Path

import pytest

from tests.data.digests import digest
from tests.data.loader_ranks import Start, records, run_to_the_end, run_until_killed
from tests.data.rank_process import SAVE_INTERVAL, fed
from tests.data.stream_order import mixed
from tests.data.streams import steps_of

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
