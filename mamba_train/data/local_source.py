"""Documents from a local file or folder of `.txt`, `.jsonl` and `.jsonl.zst`, read as a stream.

Memory is bounded by the longest document, not by the size of a file (a `.txt` file is one document).
Whatever cannot be read stops the preparation with the file, the line and the reason: text that
vanished silently would be found, if ever, after the training.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zstandard

from mamba_train.data.documents import Document, DuplicateFilter, Log, cut_tail, in_validation

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
MIN_DOCUMENTS_PER_SPLIT = 8  # fewer on one side: the split by document is too coarse
CHUNK_BYTES = 1 << 20


class LocalSource:
    """The documents of `path`, a folder (searched recursively, hidden entries left out) or one file."""

    def __init__(self, path: str | None, text_key: str) -> None:
        if not path:
            raise ValueError("data.path is not set: data.source=local needs data.path=FOLDER_OR_FILE")
        self._path = Path(path).expanduser()
        self._text_key = text_key
        with _readable(self._path):
            self._files, self._n_ignored = _find_files(self._path)
            self._stats = [file.stat() for _, file in self._files]
        self._validation_fraction = 0.0
        self._by_document = True

    def identity(self) -> dict[str, Any]:
        """The list of files with their sizes and modification times."""
        files = [
            [name, stat.st_size, stat.st_mtime_ns] for (name, _), stat in zip(self._files, self._stats, strict=True)
        ]
        return {"kind": "local", "files": files, "text_key": self._text_key}

    def record(self) -> dict[str, Any]:
        """Names and sizes of the files (relative to `data.path`)."""
        files = [[name, stat.st_size] for (name, _), stat in zip(self._files, self._stats, strict=True)]
        return {"kind": "local", "files": files, "n_ignored_files": self._n_ignored}

    def choose_split(self, validation_fraction: float, log: Log) -> str:
        """Hold out whole documents, or the end of each one where there are too few of them.

        Reads only until both splits are known to have enough documents.
        """
        if self._n_ignored:
            log(f"data: {self._n_ignored} files in {self._path} are not {', '.join(SUFFIXES)}: ignored")
        self._validation_fraction = validation_fraction
        counts = {True: 0, False: 0}
        unseen = DuplicateFilter(Counter())
        for name, ordinal, text in self._texts():
            if unseen.keep(text):
                counts[in_validation(validation_fraction, name, ordinal)] += 1
            if min(counts.values()) >= MIN_DOCUMENTS_PER_SPLIT:
                break
        self._by_document = min(counts.values()) >= MIN_DOCUMENTS_PER_SPLIT
        if self._by_document:
            rule = f"about {validation_fraction:.1%} of the documents held out for validation, by a hash"
        else:
            rule = (
                f"the last {validation_fraction:.1%} of each document held out for validation "
                f"(only {sum(counts.values())} documents: too few to hold out whole ones)"
            )
        log(f"data: {rule}")
        return rule

    def documents(self, dropped: Counter[str]) -> Iterator[Document]:
        """Documents by path, then by line."""
        unseen = DuplicateFilter(dropped)
        for name, ordinal, text in self._texts():
            if not unseen.keep(text):
                continue
            origin = f"{name}:{ordinal}"
            if self._by_document:
                held_out = in_validation(self._validation_fraction, name, ordinal)
                yield Document(origin, text, "validation" if held_out else "train")
                continue
            head, tail = cut_tail(text, self._validation_fraction)
            yield Document(origin, head, "train")
            if tail.strip():
                yield Document(origin, tail, "validation")

    def _texts(self) -> Iterator[tuple[str, int, str]]:
        """(relative path, line number from 1, text) of every document, as it is in the files."""
        for name, file in self._files:
            if name.lower().endswith(".txt"):
                with _readable(file):
                    data = file.read_bytes()
                yield name, 1, _decode(data, str(file)).removeprefix("\ufeff")
                continue
            for number, line in enumerate(_lines(_chunks(file)), start=1):
                if line.strip():
                    yield name, number, _text_of_line(line, f"{file}:{number}", self._text_key)


def _find_files(path: Path) -> tuple[list[tuple[str, Path]], int]:
    """Sorted (relative path, path) of the supported files, and the number of other files."""
    if not path.exists():
        raise ValueError(f"data.path={path}: no such file or folder")
    supported = ", ".join(SUFFIXES)
    if not path.is_dir():
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"data.path={path}: not a file of a supported kind ({supported})")
        return [(path.name, path)], 0
    found, n_ignored = [], 0
    for folder, subfolders, names in os.walk(path, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        n_ignored += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        for name in names:
            file = Path(folder) / name
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append((file.relative_to(path).as_posix(), file))
            else:
                n_ignored += not name.startswith(".")
    if not found:
        raise ValueError(
            f"data.path={path}: no file of a supported kind ({supported}) in this folder"
            + (f", only {n_ignored} others" if n_ignored else ", it is empty")
        )
    return sorted(found), n_ignored


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn a failure to read into a message that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"data.path: {error.filename or file}: cannot be read ({error.strerror})") from error


def _raise(error: OSError) -> None:
    raise error


def _chunks(file: Path) -> Iterator[bytes]:
    """The contents of a file, decompressed if it is `.zst`."""
    with _readable(file), file.open("rb") as stream:
        if file.name.lower().endswith(".zst"):
            yield from _decompressed(iter(lambda: stream.read(CHUNK_BYTES), b""), file)
        else:
            yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _decompressed(chunks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    """Decompress one or several zstd frames.

    The library's stream reader takes the end of the file for the end of the text; only the
    decompression object says whether the last frame was complete.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    for chunk in chunks:
        rest = chunk
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise ValueError(f"data.path: {file}: damaged zstd data ({error})") from error
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise ValueError(f"data.path: {file}: the zstd data is truncated; copy or download the file again")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split a stream of bytes at line feeds."""
    parts: list[bytes] = []
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
    last = b"".join(parts)
    if last:
        yield last


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}" if where.lower().endswith(".txt") else where
        raise ValueError(
            f"data.path: {place}: not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _text_of_line(line: bytes, where: str, text_key: str) -> str:
    """The text of one JSON line; `where` is FILE:LINE."""
    text = _decode(line, where).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data.path: {where}: invalid JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ValueError(f"data.path: {where}: unusable JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"data.path: {where}: expected a JSON object, got {type(record).__name__}")
    if text_key not in record:
        raise ValueError(
            f"data.path: {where}: no field {text_key!r} (data.text_key), "
            f"only {', '.join(repr(key) for key in record) or 'an empty object'}"
        )
    value = record[text_key]
    if not isinstance(value, str):
        raise ValueError(
            f"data.path: {where}: field {text_key!r} (data.text_key) must be a string, got {type(value).__name__}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"data.path: {where}: the text has an unpaired surrogate") from error
    return value
