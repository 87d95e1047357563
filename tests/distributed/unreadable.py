"""train.py, on a machine whose rank 1 cannot read the sixth step: `unreadable.py OVERRIDE ...`."""

import runpy

from mamba_train.data.batches import Batch
from mamba_train.data.corpus import ReadError
from mamba_train.data.loader import BatchLoader
from tests.helpers import REPOSITORY

read = BatchLoader.step


def step(loader: BatchLoader, first_sample: int) -> list[Batch]:
    if loader._rank == 1 and first_sample == 5 * loader.source.global_batch_size:
        raise ReadError("shard-7.bin: token 5 of 10 is not there")
    return read(loader, first_sample)


BatchLoader.step = step  # type: ignore[method-assign]
runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
