"""Text that is tokenised into local shards while the run trains on those that are finished (data.cache_shards).

The shards are those of `data_prep tokenize`, byte for byte. The order does not depend on when they are ready: the run
reads one group of input files after another, in the order of the plan, the windows of a group permuted, and waits for
a group that is not there yet. From the second epoch on everything is there.
"""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mamba_train.config_data import DataConfig
from mamba_train.data.batches import EVERYTHING, AnyCorpus, BatchSource, WindowForm
from mamba_train.data.corpus import Corpus, ReadError
from mamba_train.data.documents import SPLITS, Log
from mamba_train.data.hub_text import hub_options
from mamba_train.data.manifest import FORMAT_VERSION, Manifest
from mamba_train.data.mixture import Mixture, Stage
from mamba_train.data.order import epoch_key, permute
from mamba_train.data.shard_folder import adopt_folder, read_job
from mamba_train.data.shard_group import entry_path, read_entry
from mamba_train.data.shard_job import (
    Group,
    Job,
    JobSettings,
    create_once,
    find_inputs,
    group_inputs,
    plan,
)
from mamba_train.data.shard_manifest import assemble
from mamba_train.data.shard_pool import Work, run_pool
from mamba_train.data.text_files import TEXT_SUFFIXES, Fields
from mamba_train.data.tokenizer import TextTokenizer

FAILURE_PREFIX = ".failure-"  # with a name for the run: why no more groups will come to it
POLL_SECONDS = 0.2
BUSY_PAUSE_SECONDS = 20.0  # before it is looked again whether another process still makes a group
SHARD_BYTES = 1 << 30  # as `tokenize` closes a shard unless told otherwise


def failure_name(run_dir: Path) -> str:
    """The file in which a run says that it makes no more shards; others may go on with the same folder."""
    return FAILURE_PREFIX + hashlib.sha256(os.path.abspath(run_dir).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def begin(data: DataConfig, tokenizer: TextTokenizer, failure: str, log: Log) -> dict[str, Path]:
    """Plan the shards of a config and begin to make them in processes of their own; returns the folder of each source.

    What an earlier run has finished stays. failure: see `failure_name`. Raises ValueError that begins with the key.
    """
    places = {name: (f"data.sources.{name}", place) for name, place in data.sources.items()}
    places = places or {"": ("data.path", data.path or "")}
    return {name: _begin(place, key, data, tokenizer, failure, log) for name, (key, place) in places.items()}


def _begin(place: str, key: str, data: DataConfig, tokenizer: TextTokenizer, failure: str, log: Log) -> Path:
    inputs, paths = find_inputs([place], "train", TEXT_SUFFIXES, hub_options(data, place, key), log, key)
    settings = JobSettings(
        text_key=data.text_key,
        label_key=None,
        tokenizer_sha256=tokenizer.sha256,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        group_bytes=data.cache_group_mib << 20,
        shard_bytes=SHARD_BYTES,
        validation_fraction=0.0,
        bad_documents=str(data.bad_documents),
        max_bad_share=data.max_bad_share,
    )
    job = plan(settings, group_inputs(inputs, settings.group_bytes))
    folder = Path(data.cache_dir).expanduser() / f"{data.name}-shards-{_sha256(job)[:12]}"
    adopt_folder(folder, job, tokenizer, log, "data.cache_dir")
    (folder / failure).unlink(missing_ok=True)
    todo = [group for group in job.groups if read_entry(folder, group) is None]
    log(f"data: {len(job.groups) - len(todo):,} of {len(job.groups):,} groups of shards are finished in {folder}")
    _name_rewritten(folder, [group for group in job.groups if group not in todo], paths, log)
    fields = Fields(data.text_key)
    work = Work(
        folder, settings, fields, paths, {}, tokenizer.serialised, str(data.encoder), todo, threads=1,
        policy_options=("data.bad_documents", "data.max_bad_share"),
    )  # fmt: skip
    began = threading.Event()
    threading.Thread(
        target=_make, args=(work, job, data.cache_workers, folder / failure, began, log), daemon=True
    ).start()
    began.wait()  # the loader takes all processes for its own, and ends them, that begin while it starts some
    return folder


def _sha256(job: Job) -> str:
    return hashlib.sha256(job.to_json().encode("utf-8", "surrogatepass")).hexdigest()


def _name_rewritten(folder: Path, finished: Sequence[Group], paths: Mapping[str, Path], log: Log) -> None:
    """Say which inputs were written after the shards that were made of them: a plan knows names and sizes alone."""
    late: list[Path] = []
    for group in finished:
        made = entry_path(folder, group).stat().st_mtime
        named = [paths[entry.name] for entry in group.inputs if entry.name in paths]
        late += [path for path in named if path.stat().st_mtime > made]
    if late:
        others = f" and {len(late) - 1} more were" if len(late) > 1 else " was"
        log(
            f"warning: {late[0]}{others} written after the shards of this name and size in {folder}: if that was a "
            f"copy, nothing is wrong; if the text was edited, the run reads the old one: remove {folder} for the new"
        )


def _make(work: Work, job: Job, n_workers: int, failure: Path, began: threading.Event, log: Log) -> None:
    # SLURM tells all processes of a job that its time is up. The run stops then as soon as it can; what is started here
    # would die of it at once, and the run of that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        while work.groups:
            busy = run_pool(work, min(n_workers, len(work.groups)), lambda line: None, lambda counts: began.set())
            # Another run makes these; if it is ended before they are finished, it is up to this one.
            left = [group for group in work.groups if group.name in busy and read_entry(work.folder, group) is None]
            work = replace(work, groups=left)
            time.sleep(BUSY_PAUSE_SECONDS if left else 0)
        if assemble(work.folder, job) is not None:
            log(f"data: all shards are finished: data=shards data.path={work.folder}")
    except Exception as error:
        _say_failure(failure, " ".join(str(error).split()), log)
    finally:
        began.set()


def _say_failure(path: Path, reason: str, log: Log) -> None:
    """Tell whoever waits for the shards, on any node, that no more will come."""
    try:
        create_once(path, reason.encode("utf-8"))
    except OSError:  # a disk that is full has room for a name, mostly
        log(f"data.cache_shards: {reason}")
        with contextlib.suppress(OSError):
            path.touch()


class _Groups:
    """The groups of shards of one source, in the order of the plan, as far as they have been needed."""

    def __init__(self, name: str, folder: Path, failure: str, length: int) -> None:
        self._name, self._folder, self._failure, self._length = name, folder, folder / failure, length
        self.job = read_job(folder)
        self.known: list[Corpus] = []
        self.ends: list[int] = []  # how many windows of an epoch there are up to the end of each

    @property
    def n_windows(self) -> int | None:
        """Of an epoch; None as long as it is not known."""
        return self.ends[-1] if len(self.known) == len(self.job.groups) else None

    def corpus(self, ordinal: int) -> Corpus:
        """The group that the sample of this number is in."""
        return self.known[self._window(ordinal)[0]]

    def place(self, ordinal: int, seed: int) -> tuple[Corpus, int]:
        """The group of a sample and the token with which its window begins; waits for groups that are not finished.

        Raises ReadError when they never will be.
        """
        number, epoch, window, n_windows = self._window(ordinal)
        corpus, group = self.known[number], f"group {self.job.groups[number].name}"
        key = epoch_key(seed, epoch, f"{self._name}/{group}" if self._name else group)
        start = int(permute(np.array(window), n_windows, key)) * self._length
        return corpus, min(start, corpus.n_tokens - 1 - self._length)

    def _window(self, ordinal: int) -> tuple[int, int, int, int]:
        """The group of a sample, its epoch, which window of the group it is, and of how many."""
        while (not self.ends or ordinal >= self.ends[-1]) and len(self.known) < len(self.job.groups):
            self._await(len(self.known))
        if not self.ends[-1]:
            place = f"data.sources.{self._name}" if self._name else "data.path"
            raise ReadError(f"data.sequence_length={self._length}: no group of {place} has so many tokens")
        epoch, place_in_epoch = divmod(ordinal, self.ends[-1])
        number = int(np.searchsorted(self.ends, place_in_epoch, side="right"))
        first = self.ends[number - 1] if number else 0
        return number, epoch, place_in_epoch - first, self.ends[number] - first

    def _await(self, number: int) -> None:
        group = self.job.groups[number]
        while (entry := read_entry(self._folder, group)) is None:
            if self._failure.exists():
                reason = self._failure.read_text() or f"the log has the reason; is the disk of {self._folder} full?"
                raise ReadError(f"data.cache_shards: {group.name} will not be made: {reason}")
            time.sleep(POLL_SECONDS)
        settings = self.job.settings
        shards: dict[Any, Any] = {split: entry.shards.get(split, []) for split in SPLITS}
        manifest = Manifest(
            FORMAT_VERSION, {}, asdict(settings), "", {}, settings.tokenizer_sha256, settings.eos_id,
            settings.vocab_size, shards, {},
        )  # fmt: skip
        corpus = Corpus([(self._folder, manifest)], "train")
        # A group smaller than a window has none; the last window of a group is moved back to end with it.
        n_windows = -(-(corpus.n_tokens - 1) // self._length) if corpus.n_tokens > self._length else 0
        self.known.append(corpus)
        self.ends.append((self.ends[-1] if self.ends else 0) + n_windows)


class CachedSource(BatchSource):
    """The samples of a run whose shards are being made in `folders`, by source."""

    order = "groups-of-permuted-windows-1"
    may_change = False

    def __init__(
        self, folders: Mapping[str, Path], failure: str, global_batch_size: int, seed: int, form: WindowForm,
        stages: Sequence[tuple[int, Mapping[str, float]]] = EVERYTHING,
    ) -> None:  # fmt: skip
        """failure: see `failure_name`."""
        self.form, self.seed, self.global_batch_size = form, seed, global_batch_size
        self.changes: list[dict[str, object]] = []
        self.groups = {name: _Groups(name, folder, failure, form.length) for name, folder in folders.items()}
        self.set_stages([Stage(step, step * global_batch_size, weights) for step, weights in stages])

    def set_stages(self, stages: Sequence[Stage]) -> None:
        """As `BatchSource.set_stages`."""
        self.mixture = Mixture(stages, self.seed)
        self.names = self.mixture.names

    def fingerprint_of(self, name: str) -> str:
        """SHA-256 of the plan: inputs with their sizes, and settings but what happens to bad documents.

        Groups that were read have the same tokens when more may be left out of those to come; with less allowed, one
        that had too many is not made.
        """
        job, default = self.groups[name].job, DataConfig()
        policy, share = str(default.bad_documents), default.max_bad_share
        return _sha256(replace(job, settings=replace(job.settings, bad_documents=policy, max_bad_share=share)))

    def is_same(self, name: str, fingerprint: str) -> bool:
        """As `BatchSource.is_same`; older checkpoints have the fingerprint of the whole plan."""
        whole = _sha256(self.groups[name].job)
        return self.fingerprint_of(name).startswith(fingerprint) or whole.startswith(fingerprint)

    def places(self, samples: np.ndarray) -> list[tuple[AnyCorpus, int]]:
        """As `BatchSource.places`; waits for groups that are not finished. Raises ReadError when they never will be."""
        numbers, ordinals = self.mixture.locate(np.asarray(samples, dtype=np.int64))
        located = zip(numbers.tolist(), ordinals.tolist(), strict=True)
        return [self.groups[self.names[number]].place(ordinal, self.seed) for number, ordinal in located]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source was read; those are missing whose number of windows is not known."""
        consumed = dict(zip(self.names, self.mixture.consumed(samples).tolist(), strict=True))
        n_windows = {name: self.groups[name].n_windows for name in self.names}
        return {name: consumed[name] / n for name, n in n_windows.items() if n}

    def corpus_at(self, name: str, sample: int) -> Corpus:
        """The group that the last sample of a source before this one was in, which has been waited for."""
        consumed = int(self.mixture.consumed(sample)[self.names.index(name)])
        return self.groups[name].corpus(max(0, consumed - 1))
