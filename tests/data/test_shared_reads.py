"""Lanes that share a reading of a file get what they would get by reading it alone, and the file is read once."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data import shared_reads
from mamba_train.data.lanes import Cursor, LaneOrder
from mamba_train.data.shared_reads import Records, SharedReads
from mamba_train.data.text_files import Part, TextRecord

Read = Callable[[int, Part], Records]


def reader(n_documents: list[int], opened: list[int], fails_at: int | None = None) -> Read:
    """Files of so many numbered documents of ten bytes; `opened` notes each reading."""

    def read(file: int, part: Part) -> Iterator[TextRecord]:
        opened.append(file)
        for number in range(1, n_documents[file] + 1):
            if number == fails_at:
                raise ValueError("damaged")
            if number in part:
                yield TextRecord(number, f"{file}/{number}", 10)

    return read


def epochs(reads: SharedReads, order: LaneOrder, lane: int, cursor: Cursor) -> Iterator[TextRecord]:
    """What a lane reads from its cursor to the end of epoch 3."""
    (piece,) = order.pieces(lane, 0)
    for epoch in range(cursor.epoch, 4):
        yield from reads.read(piece, epoch, cursor.document if epoch == cursor.epoch else 0)  # type: ignore[misc]


@given(
    n_documents=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    cursors=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=7),
    turns=st.lists(st.integers(0, 6), max_size=300),
    held_bytes=st.sampled_from([0, 30, 100, 10**6]),
)
def test_lanes_get_what_they_would_read_alone(
    n_documents: list[int], cursors: list[tuple[int, int]], turns: list[int], held_bytes: int
) -> None:
    n_lanes = max(8, len(cursors))
    order = LaneOrder(0, "", len(n_documents), n_lanes)
    starts = {lane: Cursor(epoch, 0, document) for lane, (epoch, document) in enumerate(cursors)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_reads, "HELD_BYTES", held_bytes)
        together = SharedReads(order, starts, reader(n_documents, []))
        running = {lane: epochs(together, order, lane, cursor) for lane, cursor in starts.items()}
        found: dict[int, list[TextRecord]] = {lane: [] for lane in starts}
        for turn in turns:  # some lanes run ahead of others
            if (lane := turn % len(starts)) in running and (record := next(running[lane], None)) is not None:
                found[lane].append(record)
        for lane, rest in running.items():
            found[lane] += rest
    for lane, cursor in starts.items():
        alone = SharedReads(order, {lane: cursor}, reader(n_documents, []))
        assert found[lane] == list(epochs(alone, order, lane, cursor))
        assert together._passes == {}


def test_a_file_is_read_once_for_all_its_lanes() -> None:
    order, opened = LaneOrder(0, "", 2, 12), list[int]()
    starts = {lane: Cursor(0, 0, lane % 3) for lane in range(12)}
    reads = SharedReads(order, starts, reader([100, 100], opened))
    running = [epochs(reads, order, lane, cursor) for lane, cursor in starts.items()]
    while [record for records in running if (record := next(records, None))]:
        pass
    assert sorted(opened) == [0] * 4 + [1] * 4


def test_one_that_falls_far_behind_reads_alone_and_the_others_go_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "HELD_BYTES", 100)
    order, opened = LaneOrder(0, "", 1, 3), list[int]()
    starts = dict.fromkeys(range(3), Cursor())
    reads = SharedReads(order, starts, reader([300], opened))
    slow, *others = (reads.read(order.pieces(lane, 0)[0], 0, 0) for lane in range(3))
    assert next(slow).number == 1
    for _ in range(99):
        assert all(next(records) for records in others)
    assert opened == [0]
    assert [record.number for record in slow] == list(range(4, 301, 3))
    assert [next(records).number for records in others] == [299, 300]
    assert opened == [0, 0]


def test_a_failure_is_no_end_of_the_file_for_any_lane() -> None:
    order = LaneOrder(0, "", 1, 3)
    reads = SharedReads(order, dict.fromkeys(range(3), Cursor()), reader([30], [], fails_at=20))
    for lane in range(3):
        records = reads.read(order.pieces(lane, 0)[0], 0, 0)
        assert len([next(records) for _ in range(6)]) == 6
        with pytest.raises(ValueError, match="damaged"):
            list(records)
