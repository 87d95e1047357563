"""Text that is tokenised into local shards while the run trains on those that are finished (data.cache_shards).

The shards are those of `data_prep tokenize`, byte for byte. The order does not depend on when they are ready: the run
reads one group of input files after another, in the order of the plan, the windows of a group permuted, and waits for
a group that is not there yet. From the second epoch on everything is there.
"""

import hashlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from mamba_train.data.shard_group import read_entry
from mamba_train.data.shard_job import JOB_NAME, Job, JobSettings, adopt_folder, find_inputs, group_inputs, plan
from mamba_train.data.shard_manifest import assemble
from mamba_train.data.shard_pool import Work, run_pool
from mamba_train.data.shards import write_durably
from mamba_train.data.text_files import TEXT_SUFFIXES, Fields
from mamba_train.data.tokenizer import TextTokenizer

FAILURE_NAME = ".failure"  # why no more groups will come
POLL_SECONDS = 0.2
SHARD_BYTES = 1 << 30  # as `tokenize` closes a shard unless told otherwise


def begin(data: DataConfig, tokenizer: TextTokenizer, log: Log) -> Path:
    """Plan the shards of a config and begin to make them in processes of their own; returns their folder.

    What an earlier run has finished stays. Raises ValueError (`data.path`).
    """
    place = data.path or ""
    inputs, paths = find_inputs(
        [place], "train", TEXT_SUFFIXES, hub_options(data, place, "data.path"), log, "data.path"
    )
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
    key = hashlib.sha256(job.to_json().encode("utf-8", "surrogatepass")).hexdigest()[:12]
    folder = Path(data.cache_dir).expanduser() / f"{data.name}-shards-{key}"
    adopt_folder(folder, job, tokenizer)
    (folder / FAILURE_NAME).unlink(missing_ok=True)
    todo = [group for group in job.groups if read_entry(folder, group) is None]
    log(f"data: {len(job.groups) - len(todo):,} of {len(job.groups):,} groups of shards are finished in {folder}")
    fields = Fields(data.text_key)
    work = Work(folder, settings, fields, paths, {}, tokenizer.serialised, str(data.encoder), todo, threads=1)
    began = threading.Event()
    threading.Thread(target=_make, args=(work, job, data.cache_workers, began, log), daemon=True).start()
    began.wait()  # the loader takes all processes for its own, and ends them, that begin while it starts some
    return folder


def _make(work: Work, job: Job, n_workers: int, began: threading.Event, log: Log) -> None:
    # SLURM tells all processes of a job that its time is up. The run stops then as soon as it can; what is started here
    # would die of it at once, and the run of that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        if work.groups:
            run_pool(work, min(n_workers, len(work.groups)), lambda line: None, lambda counts: began.set())
        if assemble(work.folder, job) is not None:
            log(f"data: all shards are finished: data=shards data.path={work.folder}")
    except Exception as error:
        write_durably(work.folder / FAILURE_NAME, " ".join(str(error).split()).encode("utf-8"))
    finally:
        began.set()


class CachedSource(BatchSource):
    """The samples of a run whose shards are being made in `folder`."""

    order = "groups-of-permuted-windows-1"
    may_change = False

    def __init__(
        self, folder: Path, global_batch_size: int, seed: int, form: WindowForm,
        stages: Sequence[tuple[int, Mapping[str, float]]] = EVERYTHING,
    ) -> None:  # fmt: skip
        self.folder, self.form, self.seed, self.global_batch_size = folder, form, seed, global_batch_size
        self.changes: list[dict[str, object]] = []
        self.job = Job.from_json((folder / JOB_NAME).read_text(encoding="utf-8"))
        self._groups: list[Corpus] = []  # those that have been needed, in the order of the plan
        self._ends: list[int] = []  # how many windows of an epoch there are up to the end of each
        self.set_stages([Stage(step, step * global_batch_size, weights) for step, weights in stages])

    def set_stages(self, stages: Sequence[Stage]) -> None:
        """There is one stage of one source."""
        self.mixture = Mixture(stages, self.seed)
        self.names = self.mixture.names

    def fingerprint_of(self, name: str) -> str:
        """SHA-256 of the plan: inputs with their sizes, and settings."""
        return hashlib.sha256(self.job.to_json().encode("utf-8", "surrogatepass")).hexdigest()

    def places(self, samples: np.ndarray) -> list[tuple[AnyCorpus, int]]:
        """As `BatchSource.places`; waits for groups that are not finished. Raises ReadError when they never will be."""
        return [self._place(sample) for sample in np.asarray(samples, dtype=np.int64).tolist()]

    def _place(self, sample: int) -> tuple[AnyCorpus, int]:
        number, epoch, window, n_windows = self._window(sample)
        corpus = self._groups[number]
        key = epoch_key(self.seed, epoch, f"group {self.job.groups[number].name}")
        start = int(permute(np.array(window), n_windows, key)) * self.form.length
        return corpus, min(start, corpus.n_tokens - 1 - self.form.length)

    def _window(self, sample: int) -> tuple[int, int, int, int]:
        """The group of a sample, its epoch, which window of the group it is, and of how many."""
        while (not self._ends or sample >= self._ends[-1]) and len(self._groups) < len(self.job.groups):
            self._await(len(self._groups))
        if not self._ends[-1]:
            raise ReadError(f"data.sequence_length={self.form.length}: no group of data.path has so many tokens")
        epoch, place = divmod(sample, self._ends[-1])
        number = int(np.searchsorted(self._ends, place, side="right"))
        first = self._ends[number - 1] if number else 0
        return number, epoch, place - first, self._ends[number] - first

    def _await(self, number: int) -> None:
        group = self.job.groups[number]
        while (entry := read_entry(self.folder, group)) is None:
            failure = self.folder / FAILURE_NAME
            if failure.exists():
                raise ReadError(f"data.cache_shards: {group.name} will not be made: {failure.read_text()}")
            time.sleep(POLL_SECONDS)
        settings = self.job.settings
        shards: dict[Any, Any] = {split: entry.shards.get(split, []) for split in SPLITS}
        manifest = Manifest(
            FORMAT_VERSION, {}, asdict(settings), "", {}, settings.tokenizer_sha256, settings.eos_id,
            settings.vocab_size, shards, {},
        )  # fmt: skip
        corpus = Corpus([(self.folder, manifest)], "train")
        # A group smaller than a window has none; the last window of a group is moved back to end with it.
        n_windows = -(-(corpus.n_tokens - 1) // self.form.length) if corpus.n_tokens > self.form.length else 0
        self._groups.append(corpus)
        self._ends.append((self._ends[-1] if self._ends else 0) + n_windows)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often all was read; nothing as long as the number of windows is not known."""
        return {"": samples / self._ends[-1]} if len(self._groups) == len(self.job.groups) else {}

    def bytes_per_target(self, sample: int) -> float:
        """As `BatchSource.bytes_per_target`, of the group that a sample is in."""
        corpus = self._groups[self._window(sample)[0]]
        masked = corpus.n_documents if self.form.mask_loss else 0
        return corpus.n_bytes / max(1, corpus.n_tokens - masked)
