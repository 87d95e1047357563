"""The plan of a preparation at scale: which inputs become which group of shards.

It is a function of the inputs and the settings alone, so every process of every task makes the same
plan; the folder keeps it in `job.json` (`shard_folder.py`).
"""

import glob
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mamba_train.data.documents import SPLITS, Log, Split
from mamba_train.data.hub_text import HUB_PREFIX, HubText, open_hub
from mamba_train.data.shards import fsync_folder, write_durably
from mamba_train.data.stored_files import find_text_files, readable

JOB_NAME = "job.json"
JOB_VERSION = 1


@dataclass(frozen=True)
class Input:
    """One file, or one part of a dataset of the hub; `name` is relative to what all files share."""

    split: Split
    name: str
    size: int  # bytes as stored; 0 for a dataset of the hub
    hub: HubText | None = None


@dataclass(frozen=True)
class Group:
    """Inputs of one split that one worker turns into shards, in this order."""

    number: int
    split: Split
    inputs: tuple[Input, ...]

    @property
    def name(self) -> str:
        """For file names: the split and the number of the group within the job."""
        return f"{self.split}-{self.number:05d}"

    @property
    def size(self) -> int:
        """Stored bytes of the inputs."""
        return sum(entry.size for entry in self.inputs)


@dataclass(frozen=True)
class JobSettings:
    """Everything besides the inputs that determines the bytes of the shards."""

    text_key: str
    label_key: str | None
    tokenizer_sha256: str
    eos_id: int
    vocab_size: int
    group_bytes: int
    shard_bytes: int
    validation_fraction: float
    bad_documents: str
    max_bad_share: float


@dataclass(frozen=True)
class Job:
    """The whole plan."""

    job_version: int
    settings: JobSettings
    versions: dict[str, str]
    groups: tuple[Group, ...]

    def to_json(self) -> str:
        """Text of job.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The plan that `to_json` wrote. Raises ValueError, KeyError or TypeError for another text."""
        record = json.loads(text)
        groups = []
        for group in record["groups"]:
            inputs = [{**entry, "hub": entry["hub"] and HubText(**entry["hub"])} for entry in group["inputs"]]
            groups.append(Group(group["number"], group["split"], tuple(Input(**entry) for entry in inputs)))
        return cls(record["job_version"], JobSettings(**record["settings"]), record["versions"], tuple(groups))


def find_inputs(
    patterns: Sequence[str], split: Split, suffixes: Sequence[str], hub_options: dict[str, Any], log: Log,
    option: str = "--input",
) -> tuple[list[Input], dict[str, Path]]:  # fmt: skip
    """Inputs that the patterns name, in their order, and the path of each file by its name.

    A pattern is a file, a folder, a glob (`**` for any depth) or hf:NAME, and may begin with SPLIT=.
    Raises ValueError that begins with `option`.
    """
    found: dict[Path, Split] = {}
    hub: list[Input] = []
    for pattern in patterns:
        chosen, place = _split_of(pattern, split)
        if not place:
            raise ValueError(f"{option} {pattern!r}: names no file or folder")
        if place.startswith(HUB_PREFIX):
            for part in open_hub(place.removeprefix(HUB_PREFIX), chosen, hub_options, option):
                hub.append(Input(chosen, part.label(), 0, part))
            continue
        for file in _files(place, suffixes, log, option):
            if found.setdefault(file, chosen) != chosen:
                raise ValueError(f"{option} {pattern}: {file} is already an input of the {found[file]} split")
    base = os.path.commonpath([file.parent for file in found]) if found else ""
    paths = {file.relative_to(base).as_posix(): file for file in found}
    inputs = []
    for name, file in sorted(paths.items()):
        with readable(file):
            inputs.append(Input(found[file], name, file.stat().st_size))
    return inputs + hub, paths


def _split_of(pattern: str, default: Split) -> tuple[Split, str]:
    for split in SPLITS:
        if pattern.startswith(f"{split}="):
            return split, pattern.removeprefix(f"{split}=")
    return default, pattern


def _files(place: str, suffixes: Sequence[str], log: Log, option: str) -> Iterable[Path]:
    path = Path(place).expanduser()
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files: dict[Path, None] = {}
    n_ignored = 0
    for match in matches:
        is_one_of_many = len(matches) > 1 and match.is_file() and not match.name.lower().endswith(tuple(suffixes))
        if is_one_of_many:
            n_ignored += 1
            continue
        try:
            with readable(match):
                below, n_others = find_text_files(match, suffixes)
        except ValueError as error:
            raise ValueError(f"{option} {error}") from error
        n_ignored += n_others
        # Two spellings of a path are one file; a link is what it is called.
        files.update((Path(os.path.abspath(file)), None) for _, file in below)
    if not files:
        raise ValueError(f"{option} {place}: no such file or folder, and no file of a supported kind matches")
    if n_ignored:
        log(f"{option} {place}: {n_ignored} files are not {', '.join(suffixes)}: ignored")
    return files


def group_inputs(inputs: Iterable[Input], group_bytes: int) -> tuple[Group, ...]:
    """Consecutive inputs of a split together, up to `group_bytes` of stored bytes (or one larger input)."""
    groups: list[Group] = []

    def close(members: list[Input]) -> None:
        if members:
            groups.append(Group(len(groups), members[0].split, tuple(members)))

    for split in SPLITS:
        members: list[Input] = []
        size = 0  # counted on, as a group may have a million files
        for entry in (entry for entry in inputs if entry.split == split):
            if members and (size + entry.size > group_bytes or entry.hub is not None):
                close(members)
                members, size = [], 0
            members.append(entry)
            size += entry.size
        close(members)
    return tuple(groups)


def plan(settings: JobSettings, groups: tuple[Group, ...]) -> Job:
    """The plan of these groups, with the versions of the libraries that decide about the tokens."""
    versions = {"tokenizers": version("tokenizers")}
    if any(entry.hub for group in groups for entry in group.inputs):
        versions["datasets"] = version("datasets")
    return Job(JOB_VERSION, settings, versions, groups)


def create_once(path: Path, data: bytes) -> None:
    """Write a file that is complete or absent, and leave one alone that another process wrote first."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_durably(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
