"""Turn the text that `data.*` names into a prepared folder of token shards, once.

A folder is built aside under a name of its own and gets its final name by one atomic rename, so what
has the final name is complete, whoever was killed and however many processes prepared at once. The
final name holds a hash of everything that determines the content.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mamba_train.config_data import BadDocuments, DataConfig, DataSource
from mamba_train.data.documents import HELD_OUT_HERE, SPLITS, Document, DocumentSource, Log, Split
from mamba_train.data.local_source import LocalSource
from mamba_train.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    find_problem,
    read_manifest,
)
from mamba_train.data.shards import ShardSeries, fsync_folder, token_dtype, write_durably
from mamba_train.data.stdlib_source import StdlibSource
from mamba_train.data.tokenizer import MIN_VOCAB_SIZE, TextTokenizer, load_tokenizer, train_tokenizer

MAX_SHARD_BYTES = 1 << 30
ENCODE_CHARACTERS = 4_000_000  # text that is encoded at once
PROGRESS_SECONDS = 5.0


def prepare(data: DataConfig, log: Log) -> Path:
    """Make the token shards of a data config, or find them; returns their folder.

    Reads nothing but file names and sizes (for the standard library: the sources) when the folder is
    there. A folder whose files are missing or have another size is made again. Raises ValueError with
    one line that names the key, the file or the line of the file that is wrong.
    """
    if data.source == DataSource.shards:
        folder = check_prepared(Path(data.path or "").expanduser(), f"data.path={data.path}", data.check_hashes)
        _check_tokenizer(folder, data.tokenizer)
        log(f"data: using {folder}")
        return folder
    source, tokenizer = open_source(data, log)
    settings = _settings(data, tokenizer)
    key = _key(source, settings)
    cache = Path(data.cache_dir).expanduser()
    folder = cache / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', data.name)}-{key}"
    if folder.exists() and find_problem(folder, data.check_hashes) is None:
        log(f"data: using {folder}")
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{folder.name}.lock", log) as locked:
            problem = find_problem(folder, data.check_hashes) if folder.exists() else "not there"
            if problem is None:  # another process made it while this one waited
                log(f"data: using {folder}")
                return folder
            if folder.exists():
                log(f"data: WARNING: {folder} is damaged ({problem}): preparing it again")
            if locked:
                _remove_abandoned(folder)
            _build(folder, source, tokenizer, settings, data, log)
    except OSError as error:
        raise ValueError(f"data.cache_dir={data.cache_dir}: cannot be written ({error})") from error
    return folder


def check_prepared(folder: Path, key: str, with_hashes: bool = False) -> Path:
    """Check a folder that `data_prep` made: its manifest, the sizes of its files, and their hashes if asked to.

    Returns the folder. Raises ValueError that begins with `key`, which says where the folder was named.
    """
    problem = find_problem(folder, with_hashes)
    if problem is not None:
        raise ValueError(
            f"{key}: {problem}; `python -m data_prep verify` checks everything, running `tokenize` again repairs it"
        )
    return folder


def _check_tokenizer(folder: Path, path: str | None) -> None:
    """A tokenizer that is named beside finished shards has to be theirs."""
    if path is None:
        return
    given, found = load_tokenizer(path).sha256, read_manifest(folder).tokenizer_sha256
    if given != found:
        raise ValueError(
            f"data.tokenizer={path}: the shards in {folder} were made with another tokenizer "
            f"(SHA-256 {found:.12}, this one's is {given:.12}); leave data.tokenizer out"
        )


def open_source(data: DataConfig, log: Log) -> tuple[DocumentSource, TextTokenizer | None]:
    """Check what can be checked without reading the text; returns the source and the user's tokenizer.

    Raises ValueError that names the key.
    """
    if not 0 < data.validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={data.validation_fraction}: expected between 0 and 1")
    if data.tokenizer is None and data.vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"data.vocab_size={data.vocab_size}: expected at least {MIN_VOCAB_SIZE}")
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer is not None else None
    if data.source == DataSource.stdlib:
        if data.path is not None:
            raise ValueError(f"data.path={data.path}: only read with data.source=local; use data=local")
        return StdlibSource(), tokenizer
    return LocalSource(data.path, data.text_key, data.bad_documents, data.max_bad_share, log), tokenizer


def _settings(data: DataConfig, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """The settings that determine the shards; the sequence length is chosen when they are read."""
    is_local = data.source == DataSource.local
    return {
        "source": str(data.source),
        "text_key": data.text_key if is_local else None,
        "bad_documents": str(data.bad_documents) if is_local else None,
        "max_bad_share": data.max_bad_share if is_local and data.bad_documents == BadDocuments.skip else None,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        "vocab_size": None if tokenizer else data.vocab_size,
        "validation_fraction": data.validation_fraction,
    }


def _key(source: DocumentSource, settings: dict[str, Any]) -> str:
    content = {"format_version": FORMAT_VERSION, "source": source.identity(), "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _lock(path: Path, log: Log) -> Iterator[bool]:
    """Let one process of this machine prepare while others wait; yields whether the lock is held.

    It saves work and nothing more: where the file system has no locks, each process builds its own
    folder and the first rename wins. The operating system frees the lock of a killed process.
    """
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("data: another process is preparing the same data: waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _temporary_prefix(folder: Path) -> str:
    # With the host's name, because a lock may hold on one machine only.
    return f".{folder.name}.tmp-{socket.gethostname()}-"


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed preparations of this machine left behind (only while holding the lock)."""
    for path in folder.parent.iterdir():
        if path.name.startswith(_temporary_prefix(folder)):
            shutil.rmtree(path, ignore_errors=True)


def _build(
    folder: Path,
    source: DocumentSource,
    tokenizer: TextTokenizer | None,
    settings: dict[str, Any],
    data: DataConfig,
    log: Log,
) -> None:
    began = time.monotonic()
    log(f"data: preparing {folder}")
    aside = folder.with_name(f"{_temporary_prefix(folder)}{uuid.uuid4().hex[:12]}")
    aside.mkdir()
    try:
        rule = source.choose_split(data.validation_fraction, log)
        if tokenizer is None:
            tokenizer = _train(source, data.vocab_size, log)
        write_durably(aside / TOKENIZER_NAME, tokenizer.serialised)
        dropped: Counter[str] = Counter()
        shards = _write_shards(aside, source.documents(dropped), tokenizer, log)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=source.record(),
            settings=settings,
            split_rule=rule,
            dropped=dict(sorted(dropped.items())),
            tokenizer_sha256=tokenizer.sha256,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            shards=shards,
            versions={"python": platform.python_version(), "tokenizers": version("tokenizers")},
        )
        _check_not_empty(manifest)
        _write_manifest(aside, manifest)
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for split in HELD_OUT_HERE:
        log(
            f"data: {split}: {manifest.total(split, 'n_documents'):,} documents, "
            f"{manifest.total(split, 'n_bytes'):,} bytes, {manifest.total(split, 'n_tokens'):,} tokens"
        )
    for reason, count in manifest.dropped.items():
        log(f"data: left out {count:,} {reason} documents")
    log(f"data: prepared in {time.monotonic() - began:.1f} s, fingerprint {manifest.fingerprint:.12}")


def _train(source: DocumentSource, vocab_size: int, log: Log) -> TextTokenizer:
    began = time.monotonic()
    log(f"data: training a tokenizer of {vocab_size} tokens on the training split")
    texts = (document.text for document in source.documents(Counter()) if document.split == "train")
    tokenizer = train_tokenizer(texts, vocab_size)
    log(f"data: tokenizer trained in {time.monotonic() - began:.1f} s")
    if tokenizer.vocab_size < vocab_size:
        log(f"data: the text is too small for more than {tokenizer.vocab_size} tokens (data.vocab_size)")
    return tokenizer


def _series(folder: Path, split: Split, tokenizer: TextTokenizer) -> ShardSeries:
    dtype = token_dtype(tokenizer.vocab_size)
    return ShardSeries(folder, lambda n: f"{split}-{n:05d}", dtype, tokenizer.eos_id, MAX_SHARD_BYTES)


def _encode_groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups of documents large enough to keep all cores busy, and no larger."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= ENCODE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _write_shards(
    folder: Path, documents: Iterator[Document], tokenizer: TextTokenizer, log: Log
) -> dict[Split, list[ShardEntry]]:
    writers = {split: _series(folder, split, tokenizer) for split in HELD_OUT_HERE}
    began = said = time.monotonic()
    n_documents = n_bytes = n_tokens = 0
    for group in _encode_groups(documents):
        for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
            size = len(document.text.encode("utf-8"))
            writers[document.split].add(ids, size)
            n_documents, n_bytes, n_tokens = n_documents + 1, n_bytes + size, n_tokens + len(ids) + 1
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            rate = n_bytes / 1e6 / (now - began)
            log(f"data: tokenised {n_documents:,} documents, {n_tokens:,} tokens ({rate:.1f} MB/s)")
    for writer in writers.values():
        writer.close()
    return {split: writers[split].entries if split in writers else [] for split in SPLITS}


def _check_not_empty(manifest: Manifest) -> None:
    for split in HELD_OUT_HERE:
        if manifest.total(split, "n_documents") == 0:
            raise ValueError(
                f"data: no text for the {split} split; give more text (data.path) or change data.validation_fraction"
            )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    write_durably(temporary, manifest.to_json().encode("utf-8"))
    os.replace(temporary, folder / MANIFEST_NAME)
    fsync_folder(folder)


def _publish(aside: Path, folder: Path) -> None:
    """Give a finished folder its final name; a damaged one that has it is taken away first."""
    while True:
        try:
            os.rename(aside, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if find_problem(folder) is None:
            return  # another process was faster; the content is the same
        damaged = aside.with_name(f"{aside.name}-damaged")
        try:
            os.rename(folder, damaged)
        except FileNotFoundError:
            continue
        shutil.rmtree(damaged, ignore_errors=True)
    fsync_folder(folder.parent)
