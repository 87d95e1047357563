"""A process that loads with workers, to be ended in several ways: `loader_process.py SCENARIO FOLDER`.

It prints the process ids of its workers after the first step.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from mamba_train.data.batches import Batch, BatchSource, WindowForm
from mamba_train.data.corpus import Corpus, ReadError
from mamba_train.data.loader import BatchLoader


class Killed(BatchSource):
    """Whoever reads its fifth step is killed, as for want of memory, while it looks whether the DataLoader is over."""

    def batch(self, first_sample: int, rows: slice | range) -> Batch:
        if first_sample == 4 * self.global_batch_size:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                assert frame.f_back is not None
                frame = frame.f_back
            if (lock := getattr(frame.f_locals["done_event"], "_cond", None)) is not None:
                lock.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(first_sample, rows)


class Hanging(BatchSource):
    """Its second step and those after it are never read, as from a disk that has gone away."""

    def batch(self, first_sample: int, rows: slice | range) -> Batch:
        if first_sample >= self.global_batch_size:
            time.sleep(1e6)
        return super().batch(first_sample, rows)


def main(scenario: str, folder: str) -> None:
    kind = Killed if scenario == "killed" else Hanging
    source = kind({"": Corpus.open(Path(folder), "train")}, 4, 0, WindowForm(8, False))
    loader = BatchLoader(source, 0, 1, 2, workers=2, prefetch_batches=2)
    loader.step(0)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    if scenario == "wait":
        loader.step(4)
    elif scenario == "close":
        loader.close()
        assert not multiprocessing.active_children()
    elif scenario == "killed":
        try:
            for step in range(1, 6):
                loader.step(4 * step)
        except ReadError as error:
            print(error, flush=True)
        loader.close()
    elif scenario == "killed in a step":
        try:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            time.sleep(30)  # as the passes and the update do, it asks nobody
        except ReadError as error:
            print(error, flush=True)
        loader.close()
    elif scenario == "raise":
        raise ZeroDivisionError


if __name__ == "__main__":
    main(*sys.argv[1:])
