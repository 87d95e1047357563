from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data.lanes import LaneOrder, Piece

FILES = st.lists(st.integers(0, 9), min_size=1, max_size=30)  # how many documents each has


def read(order: LaneOrder, lane: int, epoch: int, n_documents: list[int]) -> list[tuple[int, int]]:
    """The documents that a lane reads in an epoch, (file, document) in their order."""
    found = []
    for piece in order.pieces(lane, epoch):
        mine = range(piece.residue, n_documents[piece.file], piece.stride)
        n_blocks = -(-len(mine) // order.block)
        places = [place for block in range(n_blocks) for place in order.documents(piece, epoch, block)]
        found += [(piece.file, mine[place]) for place in places if place < len(mine)]
    return found


@given(FILES, st.integers(1, 24), st.integers(0, 3), st.booleans(), st.integers(1, 7), st.integers(0, 2**62))
def test_an_epoch_of_all_lanes_has_each_document_once(
    n_documents: list[int], n_lanes: int, epoch: int, shuffle: bool, block: int, seed: int
) -> None:
    order = LaneOrder(seed, "pile", len(n_documents), n_lanes, shuffle, block)
    found = [place for lane in range(n_lanes) for place in read(order, lane, epoch, n_documents)]
    assert Counter(found) == Counter((file, i) for file, n in enumerate(n_documents) for i in range(n))


@given(FILES, st.integers(1, 24), st.booleans(), st.integers(1, 7))
def test_a_lane_has_the_same_documents_in_each_epoch(
    n_documents: list[int], n_lanes: int, shuffle: bool, block: int
) -> None:
    order = LaneOrder(3, "", len(n_documents), n_lanes, shuffle, block)
    for lane in range(n_lanes):
        first, second = (Counter(read(order, lane, epoch, n_documents)) for epoch in (0, 1))
        assert first == second


@given(st.integers(1, 200), st.integers(1, 64))
def test_lanes_have_equally_many_whole_files_and_one_part_at_most(n_files: int, n_lanes: int) -> None:
    order = LaneOrder(0, "", n_files, n_lanes)
    for lane in range(n_lanes):
        pieces = order.pieces(lane, 0)
        assert sum(piece.stride == 1 for piece in pieces) in (n_files // n_lanes, n_files // n_lanes + 1)
        assert len(pieces) == -(-n_files // n_lanes)


def test_without_a_shuffle_the_order_is_that_of_the_files() -> None:
    order = LaneOrder(0, "", 5, 2)
    assert order.pieces(0, 0) == [Piece(0), Piece(2), Piece(4, 2, 0)]
    assert order.pieces(1, 9) == [Piece(1), Piece(3), Piece(4, 2, 1)]
    assert order.documents(Piece(0), 0, 7) == [7]


def test_shuffles_differ_between_epochs_seeds_and_sources() -> None:
    orders = [LaneOrder(seed, name, 40, 2, True, 50) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    files = [tuple(order.pieces(0, epoch)) for order in orders for epoch in (0, 1)]
    documents = [tuple(order.documents(Piece(0), epoch, 0)) for order in orders for epoch in (0, 1)]
    assert len(set(files)) == len(set(documents)) == 6
    assert all(sorted(found) == list(range(50)) for found in documents)


def test_the_order_is_pinned() -> None:
    # A checkpoint's place in a stream means nothing under another order: change STREAM_ORDER with these lists.
    order = LaneOrder(3, "pile", 14, 4, shuffle_files=True, block=6)
    assert order.pieces(3, 0) == [Piece(11), Piece(1), Piece(10), Piece(9, 2, 1)]
    assert order.pieces(3, 1) == [Piece(10), Piece(9, 2, 1), Piece(11), Piece(1)]
    assert order.documents(Piece(5), 0, 0) == [2, 5, 1, 4, 0, 3]
    assert order.documents(Piece(5, 2, 1), 1, 2) == [15, 14, 12, 17, 16, 13]
