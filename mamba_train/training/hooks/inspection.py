"""Looking into a run: profiler traces of chosen steps, and what the GPU's memory held when it ran out."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mamba_train.training.hooks.base import Hook, Metrics, write_or_warn
from mamba_train.training.trainer import Trainer

PROFILES = "profiles"
# Allocations that are remembered; the last ones are those that matter.
MEMORY_EVENTS = 200_000


class ProfilerHook(Hook):
    """Traces chosen steps on every rank, for chrome://tracing or Perfetto: run_dir/profiles/step_N.rank_R.json.gz.

    A traced step is slower, and so are its figures in the metrics.
    """

    def __init__(self, run_dir: Path, steps: Collection[int], rank: int, log: Callable[[str], None]) -> None:
        self._folder = run_dir / PROFILES
        self._steps = frozenset(steps)
        self._rank = rank
        self._log = log
        self._profile: profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._begin_if_chosen(trainer.state.step + 1)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if self._profile is not None:
            self._profile.stop()
            finished, self._profile = self._profile, None
            write_or_warn(lambda: self._write(trainer.state.step, finished), self._log)
        self._begin_if_chosen(trainer.state.step + 1)

    def _write(self, step: int, finished: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:08d}.rank_{self._rank:05d}.json.gz"
        finished.export_chrome_trace(str(path))
        self._log(f"profile of step {step}: {path}")

    def close(self, failed: bool) -> None:
        if self._profile is not None:  # the run ended in the middle of a step
            self._profile.stop()
            self._profile = None

    def _begin_if_chosen(self, step: int) -> None:
        if step in self._steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()


class MemorySnapshotHook(Hook):
    """When the GPU runs out of memory, writes who held what: run_dir/profiles/out_of_memory.rank_R.pickle.

    https://docs.pytorch.org/memory_viz shows it. Nothing of it is ever read here.
    """

    def __init__(self, run_dir: Path, rank: int, device: torch.device, log: Callable[[str], None]) -> None:
        self._path = run_dir / PROFILES / f"out_of_memory.rank_{rank:05d}.pickle"
        self._is_gpu = device.type == "cuda"
        self._log = log

    def on_start(self, trainer: Trainer) -> None:
        if self._is_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def close(self, failed: bool) -> None:
        if self._is_gpu and isinstance(sys.exc_info()[1], torch.OutOfMemoryError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
            self._log(f"out of memory: who held what is in {self._path}")
