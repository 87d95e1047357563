"""Batches of one rank, read ahead by processes of PyTorch's DataLoader.

An item of the dataset is a whole micro-batch, and which tokens are in it is computed from its number; so it makes
no difference to the data how many workers there are or which of them reads it.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mamba_train.data.batches import Batch, BatchSource
from mamba_train.data.corpus import ReadError
from mamba_train.data.streams import Source

# What ends a job or a run: the trainer decides what to do about it, its workers just go on reading.
SHIELDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ENDLESS = 2**62  # items of the dataset: the trainer says when it is over
GRACE_SECONDS = 1.0  # for a worker to end by itself, which takes no time unless a read hangs


@dataclass(frozen=True)
class RankBatches(Dataset):
    """Item i: the i-th micro-batch of a rank, counted from the global batch that begins at `first_sample`.

    An error of reading is returned and not raised: the DataLoader would wrap it into a traceback.
    """

    source: BatchSource
    first_sample: int
    rank: int
    world_size: int
    micro_batch_size: int

    @property
    def micro_batches_per_step(self) -> int:
        """How many items make the part of a global batch that this rank has."""
        return self.source.global_batch_size // self.world_size // self.micro_batch_size

    def __getitem__(self, index: int) -> Batch | ReadError:
        step, micro = divmod(index, self.micro_batches_per_step)
        row = self.source.global_batch_size // self.world_size * self.rank + self.micro_batch_size * micro
        try:
            return self.source.batch(
                self.first_sample + step * self.source.global_batch_size, range(row, row + self.micro_batch_size)
            )
        except ReadError as error:
            return error


class BatchLoader:
    """Gives a rank its micro-batches of each global batch; `close` it when done.

    wait_seconds: how long the last call of `step` took, during which the device has nothing to do. waiting_since:
    time.monotonic() of the call of `step` that has not returned, for other threads; came_at: of the last return.
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        workers: int = 0,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
    ) -> None:
        """Raises ValueError (`training.global_batch_size`) when ranks and micro-batches do not divide it."""
        if source.global_batch_size % (world_size * micro_batch_size):
            raise ValueError(
                f"training.global_batch_size={source.global_batch_size}: expected a multiple of "
                f"training.micro_batch_size times the number of ranks ({micro_batch_size} * {world_size})"
            )
        self.source = source
        self.wait_seconds = 0.0
        self.waiting_since: float | None = None
        self.came_at = 0.0
        # Of the last step, where it is counted: bytes of the targets, documents left out, requests repeated, and what
        # the source makes epochs of.
        self.counts: tuple[int, ...] = (0, 0, 0)
        self.finite = False  # the text ends: then there are no targets any more
        self._rank, self._world_size, self._micro_batch_size = rank, world_size, micro_batch_size
        self._workers, self._prefetch_batches, self._pin_memory = workers, prefetch_batches, pin_memory
        self._items: Iterator[Batch | ReadError] | None = None
        self._processes: set[multiprocessing.process.BaseProcess] = set()
        self._alive: Connection | None = None  # the workers see when it is closed, also by the end of this process
        self._next_sample = -1
        self._n_micro_batches = 0

    def step(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at a sample.

        Consecutive global batches have been read ahead; another one than the next is no mistake, only slow.
        Raises ReadError, which names shard and offset.
        """
        began = self.waiting_since = time.monotonic()
        try:
            return self._step(first_sample)
        finally:
            self.came_at, self.waiting_since = time.monotonic(), None
            self.wait_seconds = self.came_at - began

    def _step(self, first_sample: int) -> list[Batch]:
        if self._items is None or first_sample != self._next_sample:
            self._start(first_sample)
        batches = [self._next() for _ in range(self._n_micro_batches)]
        self._next_sample = first_sample + self.source.global_batch_size
        return batches

    def begin(self, first_sample: int) -> None:
        """Let the workers begin to read, if there are any, before the first step asks for it."""
        if self._workers and self._items is None:
            self._start(first_sample)
            self._next_sample = first_sample

    def gather(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Learn what the other ranks know of the state of the source: nothing, as a position is all there is."""

    def close(self) -> None:
        """End the workers, also one that hangs in a read."""
        atexit.unregister(self.close)
        if self._alive is not None:
            self._alive.close()
        self._items = None  # the DataLoader asks them to end, too, and waits for them
        for process in self._processes:
            # Whoever is still here ignores the SIGTERM of Python's exit, which would wait for it for ever.
            process.kill()
        self._alive, self._processes = None, set()

    def _start(self, first_sample: int) -> None:
        self.close()
        dataset = self._dataset(first_sample)
        options: dict[str, Any] = {}
        if self._workers:
            # Not a fork: it would inherit the locks of other threads, the lock of the run folder and the GPU.
            context = _SpawnContext()
            watched, self._alive = context.Pipe(duplex=False)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": self._prefetch_batches,
                "worker_init_fn": partial(_begin_worker, watched),
            }
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(ENDLESS),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # it draws a number, which must not be one of the run's
            **options,
        )
        before = set(multiprocessing.active_children())
        with _signals_blocked():  # what is started here has them blocked from its first instruction on
            self._items = iter(loader)
        self._processes = set(multiprocessing.active_children()) - before
        if self._workers and threading.current_thread() is threading.main_thread():
            _name_the_dead()
        atexit.register(self.close)

    def _dataset(self, first_sample: int) -> Dataset:
        assert isinstance(self.source, BatchSource)
        dataset = RankBatches(self.source, first_sample, self._rank, self._world_size, self._micro_batch_size)
        self._n_micro_batches = dataset.micro_batches_per_step
        return dataset

    def _next(self) -> Any:
        assert self._items is not None
        try:
            item = next(self._items)
        except RuntimeError as error:
            if all(process.is_alive() for process in self._processes):
                raise
            raise _has_died(error) from error
        if isinstance(item, ReadError):
            raise item
        return item


def _has_died(error: RuntimeError) -> ReadError:
    return ReadError(f"a process that loads data has died ({' '.join(str(error).split())})")


def _name_the_dead() -> None:
    """Have the DataLoader's handler of SIGCHLD, which raises when a worker is killed, say it as a ReadError."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or isinstance(handler, _Naming):
        return
    signal.signal(signal.SIGCHLD, _Naming(handler))


@dataclass(frozen=True)
class _Naming:
    handler: Callable[[int, Any], object]

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            raise _has_died(error) from error


class _SpawnContext(SpawnContext):
    """For the DataLoader, whose one event tells its workers that it is over, and which they look at for every item."""

    def Event(self) -> Any:
        return _Flag(self)


class _Flag:
    """An `Event` without a lock: a worker that is killed while it looks would hold that for ever, also at `close`."""

    def __init__(self, context: SpawnContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    # The tracker is started with the first worker otherwise, and unblocks two of the signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(watched: Connection, number: int) -> None:
    for shielded in SHIELDED_SIGNALS:
        signal.signal(shielded, signal.SIG_IGN)
    threading.Thread(target=_end_when_closed, args=(watched,), daemon=True).start()


def _end_when_closed(watched: Connection) -> None:
    """A trainer that was killed cannot end its workers, and one that ends must not wait for a read that hangs."""
    watched.poll(None)
    time.sleep(GRACE_SECONDS)
    os._exit(0)
