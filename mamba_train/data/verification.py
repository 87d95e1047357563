"""Check every byte of a prepared folder: what `find_problem` takes on trust, this reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mamba_train.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, ShardEntry, file_sha256
from mamba_train.data.shard_folder import read_job
from mamba_train.data.shard_group import GROUPS_FOLDER
from mamba_train.data.shard_job import JOB_NAME
from mamba_train.data.shard_manifest import compose
from mamba_train.data.shards import ShardReader, token_dtype
from mamba_train.data.tokenizer import load_tokenizer

CHECKED_TOKENS = 1 << 24  # looked at in one go


def folder_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong beside the shards: the tokenizer, entries that cannot be."""
    path = folder / TOKENIZER_NAME
    try:
        tokenizer = load_tokenizer(path, str(path))
    except ValueError as error:
        yield str(error)
    else:
        if tokenizer.sha256 != manifest.tokenizer_sha256:
            yield f"{path}: SHA-256 {tokenizer.sha256:.12}, the manifest says {manifest.tokenizer_sha256:.12}"
        for name, here, there in (
            ("end-of-document id", tokenizer.eos_id, manifest.eos_id),
            ("vocabulary", tokenizer.vocab_size, manifest.vocab_size),
        ):
            if here != there:
                where = folder / MANIFEST_NAME
                yield f"{where}: {name} {there}, the tokenizer has {here}: another tokenizer's manifest?"
    names = [shard.name for shards in manifest.shards.values() for shard in shards]
    if len(set(names)) < len(names):
        yield f"{folder / MANIFEST_NAME}: lists a shard twice"
    listed = {f"{name}{suffix}" for name in names for suffix in (".bin", ".idx")}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix in (".bin", ".idx") and not name.startswith(".") and name not in listed:
            yield f"{file}: this shard is not in the manifest"


def plan_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What of the manifest is not what the plan and the entries of the groups make together, where they are there."""
    path = folder / JOB_NAME
    if not path.exists():
        return
    try:
        expected = compose(folder, read_job(folder))
    except (OSError, ValueError) as error:
        yield f"{path}: it or an entry in {GROUPS_FOLDER} cannot be read ({error})"
        return
    if expected is not None and expected != manifest:
        yield f"{folder / MANIFEST_NAME}: is not what {GROUPS_FOLDER} says; delete it and run `tokenize` again"


def shard_problems(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """What is wrong with one shard; each line begins with the file. Reads all of it twice, in pieces."""
    broken = False
    for suffix, size, sha256 in (
        (".bin", entry.bin_size, entry.bin_sha256),
        (".idx", entry.idx_size, entry.idx_sha256),
    ):
        path = folder / (entry.name + suffix)
        if not path.is_file():
            yield f"{path}: is missing"
            broken = True
        elif path.stat().st_size != size:
            yield f"{path}: {path.stat().st_size} bytes, the manifest says {size}"
            broken = True
        elif file_sha256(path) != sha256:
            yield f"{path}: SHA-256 is not the manifest's: a byte was changed"
    if broken:
        return
    try:
        shard = ShardReader(folder / entry.name)
    except ValueError as error:
        yield str(error)
        return
    yield from _index_problems(folder, manifest, entry, shard)
    yield from _token_problems(folder, manifest, entry, shard)


def _index_problems(folder: Path, manifest: Manifest, entry: ShardEntry, shard: ShardReader) -> Iterator[str]:
    path = folder / f"{entry.name}.idx"
    if shard.tokens.dtype != token_dtype(manifest.vocab_size).newbyteorder("<"):
        yield f"{path}: tokens of type {shard.tokens.dtype}, a vocabulary of {manifest.vocab_size} needs another"
    if len(shard) != entry.n_documents:
        yield f"{path}: {len(shard)} documents, the manifest says {entry.n_documents}"
    if len(shard.tokens) != entry.n_tokens:
        yield f"{path}: {len(shard.tokens)} tokens, the manifest says {entry.n_tokens}"
    if (shard.lengths < 1).any():
        yield f"{path}: document {int(np.argmax(shard.lengths < 1))} has no length"
    starts = np.cumsum(shard.lengths, dtype=np.int64) - shard.lengths
    if not np.array_equal(starts * shard.tokens.itemsize, shard.pointers):
        yield f"{path}: the offsets are not the sums of the lengths"
    if not np.array_equal(shard.document_index, np.arange(len(shard) + 1)):
        yield f"{path}: the document index is not one sequence per document"


def _token_problems(folder: Path, manifest: Manifest, entry: ShardEntry, shard: ShardReader) -> Iterator[str]:
    """Ids outside the vocabulary, and end-of-document ids that are not exactly the last of each document."""
    path = folder / f"{entry.name}.bin"
    ends = np.cumsum(shard.lengths, dtype=np.int64) - 1
    n_found = 0
    last_was_end = True  # the shard begins like a document
    for first in range(0, len(shard.tokens), CHECKED_TOKENS):
        tokens = shard.tokens[first : first + CHECKED_TOKENS]
        outside = (tokens >= manifest.vocab_size) | (tokens < 0)
        if outside.any():
            place = int(np.argmax(outside))
            yield (
                f"{path}: token {first + place} (offset {(first + place) * tokens.itemsize}) is {int(tokens[place])}, "
                f"the vocabulary has {manifest.vocab_size}"
            )
            return
        found = np.flatnonzero(tokens == manifest.eos_id) + first
        doubled = np.flatnonzero(np.diff(found, prepend=first - 1 if last_was_end else first - 2) == 1)
        if len(doubled):
            place = int(found[doubled[0]])
            yield f"{path}: token {place} (offset {place * tokens.itemsize}) ends an empty document: a doubled end"
            return
        expected = ends[n_found : n_found + len(found)]
        if len(expected) < len(found) or (found != expected).any():
            wrong = int(np.argmax(found[: len(expected)] != expected)) if len(expected) else 0
            place = int(found[wrong])
            yield (
                f"{path}: token {place} (offset {place * tokens.itemsize}) is the end-of-document id, "
                "but no document ends there"
            )
            return
        n_found += len(found)
        last_was_end = bool(tokens[-1] == manifest.eos_id)
    if n_found != len(ends):
        yield f"{path}: {len(ends)} documents, but only {n_found} end with the end-of-document id"
