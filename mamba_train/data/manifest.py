"""`manifest.json` of a prepared folder: what is in it, and what determined it.

It is written last, so a folder without it is not complete. It holds no time, host or path: preparing
the same text twice gives the same file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mamba_train.data.documents import SPLITS, Split

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: `name`.bin and `name`.idx, in the folder of the manifest or below it.

    `label` is the domain that all its documents come from ("" where the source has none). `n_tokens`
    counts the end-of-document tokens, `n_bytes` is the UTF-8 size of the text, sizes are in bytes.
    """

    name: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    bin_size: int
    idx_size: int
    bin_sha256: str
    idx_sha256: str
    label: str = ""


@dataclass(frozen=True)
class Manifest:
    """The record of a prepared folder."""

    format_version: int
    source: dict[str, Any]
    settings: dict[str, Any]  # the data.* keys that determine the content
    split_rule: str
    dropped: dict[str, int]  # documents left out, by reason
    tokenizer_sha256: str
    eos_id: int
    vocab_size: int
    shards: dict[Split, list[ShardEntry]]  # of every split, possibly none
    versions: dict[str, str]  # libraries and Python

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a batch depends on: the tokens, their order and domains, and the tokenizer."""
        tokens = {
            split: [[shard.label, shard.n_tokens, shard.bin_sha256] for shard in self.shards[split]] for split in SPLITS
        }
        content = {
            "format_version": self.format_version,
            "tokenizer_sha256": self.tokenizer_sha256,
            "eos_id": self.eos_id,
            "shards": tokens,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def total(self, split: Split, field: str) -> int:
        """The sum of a number over the shards of a split, such as "n_tokens"."""
        return sum(getattr(shard, field) for shard in self.shards[split])

    def to_json(self) -> str:
        """Text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder. Raises ValueError that names the file."""
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']}, expected {FORMAT_VERSION}")
        shards = {split: [ShardEntry(**entry) for entry in record["shards"].get(split, [])] for split in SPLITS}
        for entry in (entry for listed in shards.values() for entry in listed):
            for field in fields(entry):
                if type(getattr(entry, field.name)) is not field.type:
                    raise ValueError(f"{field.name} of shard {entry.name} is {getattr(entry, field.name)!r}")
        return Manifest(**{**record, "shards": shards})
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a prepared data folder ({MANIFEST_NAME} is missing)") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error})") from error


def find_problem(folder: Path, with_hashes: bool = False) -> str | None:
    """What is wrong with a prepared folder by its manifest and the sizes of its files, None if nothing.

    with_hashes: read every shard and compare its SHA-256, too.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    expected = {}
    for split in SPLITS:
        for shard in manifest.shards[split]:
            expected[f"{shard.name}.bin"] = shard.bin_size, shard.bin_sha256
            expected[f"{shard.name}.idx"] = shard.idx_size, shard.idx_sha256
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if with_hashes and file_sha256(path) != sha256:
            return f"{name} was changed: its SHA-256 is not the manifest's"
    tokenizer = folder / TOKENIZER_NAME
    if not tokenizer.is_file():
        return f"{TOKENIZER_NAME} is missing"
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
        return f"{TOKENIZER_NAME} was changed"
    return None
