"""What rank 0 finds out alone reaches the others, however much it is."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from mamba_train.ranks import PART_CHARACTERS, Launch, Ranks


def test_a_value_may_be_larger_than_the_store_takes_at_once() -> None:
    """As the list of files of a corpus is that has tens of thousands of them."""
    timeout = timedelta(seconds=30)
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", served.port, timeout=timeout)
    value = {"files": [f"train/{number:07d}é" for number in range(600_000)]}
    assert sum(map(len, value["files"])) > 2 * PART_CHARACTERS
    asked: list[int] = []

    def list_files() -> dict[str, list[str]]:
        asked.append(1)
        return value

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda ranks: ranks.first(list_files), [Ranks(Launch(n, 2, n), s) for n, s in ((0, served), (1, other))]
        )
        assert list(found) == [value, value]
    assert asked == [1]
