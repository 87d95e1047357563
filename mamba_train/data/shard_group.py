"""Turn one group of inputs into shards: one per domain (several, if it is large), by one worker, in order.

The shards are written aside and renamed when all are complete; the group's entry in `groups/` is written
last and is where a killed job goes on. The bytes depend on the group and the job's settings alone.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_train.config_data import BadDocuments
from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.documents import Log, Split, in_validation
from mamba_train.data.encoders import Encoder, EncoderMismatch, ReferenceEncoder
from mamba_train.data.hub_text import read_hub
from mamba_train.data.manifest import ShardEntry
from mamba_train.data.shard_job import Group, Input, JobSettings
from mamba_train.data.shards import ShardSeries, fsync_folder, token_dtype, write_durably
from mamba_train.data.text_files import BadDocument, Fields, TextRecord, read_texts
from mamba_train.data.tokenizer import TextTokenizer

GROUPS_FOLDER = "groups"
WORK_FOLDER = ".work"
BATCH_CHARACTERS = 1_000_000  # encoded at once: enough for a few threads, and some 100 MB
MAX_LABELS = 256
LOCK_SECONDS = 5.0  # a worker whose command was killed needs a moment to notice
Progress = Callable[[int, int, int], None]  # bytes read, documents, tokens since the last call


@dataclass(frozen=True)
class GroupEntry:
    """The record of a finished group. `inputs` says of each what was read and what was left out."""

    group: str
    inputs: list[dict[str, Any]]
    shards: dict[Split, list[ShardEntry]]
    encoder: str


@dataclass(frozen=True)
class Surroundings:
    """What a worker needs besides the group: where files are, and what its work must not depend on."""

    folder: Path
    settings: JobSettings
    fields: Fields
    paths: dict[str, Path]  # of the inputs, by name
    checksums: dict[str, str]  # expected SHA-256 of inputs, by name
    log: Log
    progress: Progress
    policy_options: tuple[str, str] = ("--bad-documents", "--max-bad-share")  # as messages call them


def entry_path(folder: Path, group: Group) -> Path:
    """Where the entry of a group is when it is finished."""
    return folder / GROUPS_FOLDER / f"{group.name}.json"


def read_entry(folder: Path, group: Group) -> GroupEntry | None:
    """The entry of a group that is finished and whose shards have their sizes, else None."""
    path = entry_path(folder, group)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        shards = {split: [ShardEntry(**shard) for shard in listed] for split, listed in record["shards"].items()}
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable entry ({error}); delete it and run `tokenize` again") from error
    for shard in (shard for listed in shards.values() for shard in listed):
        for suffix, size in ((".bin", shard.bin_size), (".idx", shard.idx_size)):
            file = folder / (shard.name + suffix)
            if not file.is_file() or file.stat().st_size != size:
                return None
    return GroupEntry(record["group"], record["inputs"], shards, record["encoder"])


def tokenise_group(group: Group, tokenizer: TextTokenizer, encoder: Encoder, around: Surroundings) -> bool:
    """Make the shards of a group and its entry; False if another process is making them.

    Falls back to the reference encoder, with a warning, if `encoder` fails its check. Raises ValueError
    for what is wrong with the inputs, OSError for what is wrong with the disk.
    """
    work = around.folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    with _lock(work / f"{group.name}.lock") as locked:
        if locked is False:
            return False
        if read_entry(around.folder, group) is not None:
            return True  # another process was faster
        if locked:  # so nobody is writing what lies here
            for leftover in work.glob(f"{group.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        aside = work / f"{group.name}-{socket.gethostname()}-{os.getpid()}"
        try:
            try:
                entry = _write_aside(aside, group, tokenizer, encoder, around)
            except EncoderMismatch as error:
                around.log(f"WARNING: {group.name}: {error}: the whole group is encoded by the reference instead")
                shutil.rmtree(aside)
                entry = _write_aside(aside, group, tokenizer, ReferenceEncoder(tokenizer), around)
            _publish(aside, entry, around.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return True


@contextmanager
def _lock(path: Path) -> Iterator[bool | None]:
    """Yields True with the lock, False if another process has it, None where there are no locks.

    It saves work and nothing more: two processes would write the same bytes.
    """
    with path.open("w") as stream:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(0.1)
                    continue
                yield False
            except OSError:
                yield None
            else:
                yield True
            return


def _write_aside(
    aside: Path, group: Group, tokenizer: TextTokenizer, encoder: Encoder, around: Surroundings
) -> GroupEntry:
    settings = around.settings
    bad = BadDocumentFilter(
        BadDocuments(settings.bad_documents), settings.max_bad_share, around.log, *around.policy_options
    )
    writers = _Writers(aside, group, tokenizer, settings)
    inputs = [_tokenise_input(entry, bad, encoder, writers, around) for entry in group.inputs]
    bad.check_share(f"group {group.name}")
    return GroupEntry(group.name, inputs, writers.close(), encoder.name)


def _tokenise_input(
    entry: Input, bad: BadDocumentFilter, encoder: Encoder, writers: "_Writers", around: Surroundings
) -> dict[str, Any]:
    """Read, encode and write all documents of one input; returns its record for the manifest."""
    sha256 = hashlib.sha256()

    def on_chunk(chunk: bytes) -> None:
        sha256.update(chunk)
        around.progress(len(chunk), 0, 0)

    where = around.paths.get(entry.name, entry.name)
    records = read_hub(entry.hub, around.fields) if entry.hub else read_texts(Path(where), around.fields, on_chunk)
    n_documents = n_bytes = 0
    for batch in _batches(bad.usable(entry.name, where, records)):
        n_tokens = 0
        for record, ids in zip(batch, encoder.encode(batch), strict=True):
            if not len(ids):
                bad.n_good[entry.name] -= 1
                bad.reject(entry.name, where, BadDocument(record.number, "no tokens", "the tokenizer drops it all"))
                continue
            writers.add(entry, record, ids)
            n_documents, n_bytes, n_tokens = n_documents + 1, n_bytes + record.n_bytes, n_tokens + len(ids) + 1
        around.progress(0, len(batch), n_tokens)
    if not n_documents:
        around.log(f"WARNING: {where}: there is no document in it")
    digest = None if entry.hub else sha256.hexdigest()
    _check_input(entry, digest, around)
    return {
        "name": entry.name,
        "split": entry.split,
        "size": entry.size,
        "sha256": digest,
        "n_documents": n_documents,
        "n_bytes": n_bytes,
        "skipped": dict(sorted(bad.counts.get(entry.name, {}).items())),
        "skipped_first": bad.places.get(entry.name, []),
    }


def _check_input(entry: Input, digest: str | None, around: Surroundings) -> None:
    path = around.paths.get(entry.name)
    if path is not None and path.stat().st_size != entry.size:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, {entry.size} when the job began: was it changed?")
    expected = around.checksums.get(entry.name)
    if expected is not None and digest != expected:
        raise ValueError(f"{path}: SHA-256 {digest:.12}..., --checksums says {expected:.12}...; copy the file again")


def _batches(records: Iterable[TextRecord]) -> Iterator[list[TextRecord]]:
    batch: list[TextRecord] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        del record  # else the longest text would stay in memory beside the next ones
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writers:
    """One series of shards for each split and domain of a group."""

    def __init__(self, folder: Path, group: Group, tokenizer: TextTokenizer, settings: JobSettings) -> None:
        self._folder, self._group, self._tokenizer, self._settings = folder, group, tokenizer, settings
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._series: dict[tuple[Split, str], ShardSeries] = {}
        folder.mkdir()

    def add(self, entry: Input, record: TextRecord, ids: Any) -> None:
        if (ids == self._tokenizer.eos_id).any():
            raise ValueError(f"{entry.name}:{record.number}: the encoder made an end-of-document id of the text itself")
        split = entry.split
        fraction = self._settings.validation_fraction
        if split == "train" and fraction and in_validation(fraction, entry.name, record.number):
            split = "validation"
        key = split, record.label
        if key not in self._series:
            self._series[key] = self._begin(split, record.label)
        self._series[key].add(ids, record.n_bytes)

    def _begin(self, split: Split, label: str) -> ShardSeries:
        if len(self._series) == MAX_LABELS:
            raise ValueError(f"--label-key {self._settings.label_key}: more than {MAX_LABELS} domains: is it one?")
        prefix = "/".join([split, *([label_folder(label)] if label else []), f"{self._group.number:05d}"])
        return ShardSeries(
            self._folder, lambda n: f"{prefix}-{n:03d}", self._dtype, self._tokenizer.eos_id, self._settings.shard_bytes
        )

    def close(self) -> dict[Split, list[ShardEntry]]:
        """Finish all shards; their entries by split, then by label."""
        found: dict[Split, list[ShardEntry]] = {}
        for (split, label), series in sorted(self._series.items()):
            series.close()
            found.setdefault(split, []).extend(ShardEntry(**{**asdict(e), "label": label}) for e in series.entries)
        return found


def label_folder(label: str) -> str:
    """A folder's name for a domain: readable, and another one for every label."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", label)[:80]
    return plain if plain == label else f"{plain}.{hashlib.sha256(label.encode('utf-8')).hexdigest()[:8]}"


def _publish(aside: Path, entry: GroupEntry, folder: Path) -> None:
    """Give the finished shards their names, then say so in the group's entry."""
    for shard in (shard for listed in entry.shards.values() for shard in listed):
        target = folder / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(aside / (shard.name + suffix), folder / (shard.name + suffix))
        fsync_folder(target.parent)
    write_durably(aside / "entry.json", (json.dumps(asdict(entry), indent=1) + "\n").encode("utf-8"))
    (folder / GROUPS_FOLDER).mkdir(exist_ok=True)
    os.replace(aside / "entry.json", folder / GROUPS_FOLDER / f"{entry.group}.json")
    fsync_folder(folder / GROUPS_FOLDER)
