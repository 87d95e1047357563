"""Texts from files (`.txt`, `.jsonl` plain or compressed, `.parquet`, FASTA), read as a stream.

A document that cannot be used is yielded as a `BadDocument`, so that one policy decides about all of
them (`mamba_train.data.bad_documents`). A file that cannot be read to its end raises ValueError with
the file and the reason: text that vanished silently would be found, if ever, after the training.

Memory is bounded by the longest document, not by the size of a file (a `.txt` file is one document),
and a document by `MAX_DOCUMENT_BYTES`.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
FASTA_SUFFIXES = tuple(name + packed for name in (".fasta", ".fa", ".fna") for packed in ("", ".gz", ".zst"))
CHUNK_BYTES = 1 << 17  # small, because a compressed chunk may hold a thousand times as much
MAX_DOCUMENT_BYTES = 2 << 30
BASES = "ACGTNRYSWKMBDHVU"  # the four, any, the other ambiguity codes of IUPAC, and uracil
OnChunk = Callable[[bytes], object]


@dataclass(frozen=True)
class Fields:
    """Where a record holds its text and, if it has one, its domain; a dot leads into a nested object.

    `text_option` and `label_option` are what messages call the two settings.
    """

    text_key: str
    label_key: str | None = None
    text_option: str = "data.text_key"
    label_option: str = "--label-key"


@dataclass(frozen=True)
class TextRecord:
    """A usable document: its line, row or sequence (from 1), its text, its UTF-8 size, its domain."""

    number: int
    text: str
    n_bytes: int
    label: str = ""


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: its line or row, the kind of fault (for counts), the fault in words."""

    number: int
    kind: str
    problem: str


class _Unusable(Exception):
    """Raised inside this module; `kind` and the message become a BadDocument."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def read_texts(file: Path, fields: Fields, on_chunk: OnChunk | None = None) -> Iterator[TextRecord | BadDocument]:
    """All documents of a file in their order; `on_chunk` is called with each piece of the stored bytes.

    Raises ValueError that begins with the file if it cannot be read to its end.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(file, fields, on_chunk)
    elif name.endswith(FASTA_SUFFIXES):
        yield from _fasta(_chunks(file, on_chunk), file)
    elif name.endswith(".txt"):
        yield from _convert([(1, b"".join(_bounded(_chunks(file, on_chunk), file)))], _text_record)
    else:
        lines = enumerate(_lines(_chunks(file, on_chunk), file), start=1)
        yield from _convert(((n, line) for n, line in lines if line.strip()), lambda line: _json_record(line, fields))


def record_of(row: Any, fields: Fields) -> tuple[str, int, str]:
    """Text, its size in UTF-8 and label of a row. Raises _Unusable."""
    text = _string(row, fields.text_key, fields.text_option)
    label = "" if fields.label_key is None else _string(row, fields.label_key, fields.label_option)
    if not label.isascii():
        _checked(f"x{label}")  # it becomes the name of a folder
    return *_checked(text), label


def records_of(rows: Iterator[tuple[int, Any]], fields: Fields) -> Iterator[TextRecord | BadDocument]:
    """The documents of numbered rows (dictionaries)."""
    return _convert(rows, lambda row: record_of(row, fields))


def _convert(
    rows: Iterator[tuple[int, Any]] | list[tuple[int, Any]], convert: Callable[[Any], tuple[str, int, str]]
) -> Iterator[TextRecord | BadDocument]:
    for number, row in rows:
        try:
            text, n_bytes, label = convert(row)
        except _Unusable as error:
            yield BadDocument(number, error.kind, str(error))
        else:
            yield TextRecord(number, text, n_bytes, label)


def _checked(text: str) -> tuple[str, int]:
    if not text or text.isspace():
        raise _Unusable("empty", "the text is empty")
    try:
        return text, len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise _Unusable("unpaired surrogate", "the text has an unpaired surrogate") from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{data[error.start]:02x}" + (f" in line {line}" if line > 1 else "")
        raise _Unusable("not UTF-8", f"not valid UTF-8 ({place}); convert the file to UTF-8") from None


def _text_record(data: bytes) -> tuple[str, int, str]:
    return *_checked(_decoded(data)), ""


def _json_record(line: bytes, fields: Fields) -> tuple[str, int, str]:
    text = _decoded(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _Unusable("invalid JSON", f"invalid JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise _Unusable("invalid JSON", f"unusable JSON ({error})") from None
    if not isinstance(row, dict):
        raise _Unusable("wrong type", f"expected a JSON object, got {type(row).__name__}")
    return record_of(row, fields)


def _string(row: Any, key: str, option: str) -> str:
    """The string at a dotted key; an object on the way may be written as a JSON string."""
    value = row
    for part in key.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (RecursionError, ValueError):
                value = None
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(repr(name) for name in value) if isinstance(value, dict) else type(value).__name__
            raise _Unusable("no field", f"no field {key!r} ({option}), only {there or 'an empty object'}")
        value = value[part]
    if not isinstance(value, str):
        got = type(value).__name__
        raise _Unusable("wrong type", f"field {key!r} ({option}) must be a string, got {got}")
    return value


def _parquet(file: Path, fields: Fields, on_chunk: OnChunk | None) -> Iterator[TextRecord | BadDocument]:
    # Here, because importing it takes longer than reading a small file of another kind.
    import pyarrow
    import pyarrow.parquet

    if on_chunk is not None:  # columns are read out of order, so the stored bytes need a reading of their own
        for chunk in _stored(file):
            on_chunk(chunk)
    keys = [fields.text_key, *([fields.label_key] if fields.label_key else [])]
    columns = sorted({key.split(".")[0] for key in keys})
    try:
        with readable(file), pyarrow.parquet.ParquetFile(file) as table:
            missing = [column for column in columns if column not in table.schema_arrow.names]
            if missing:
                there = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{file}: no column {missing[0]!r} ({fields.text_option}), only {there}")
            batches = table.iter_batches(batch_size=64, columns=columns)
            rows = (batch.slice(i, 1) for batch in batches for i in range(batch.num_rows))
            yield from _convert(enumerate(rows, start=1), lambda row: record_of(_row(row), fields))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: damaged parquet data ({' '.join(str(error).split())})") from error


def _row(batch: Any) -> dict[str, Any]:
    """The only row of a batch of Arrow columns."""
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        raise _Unusable("not UTF-8", f"not valid UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def _fasta(chunks: Iterator[bytes], file: Path) -> Iterator[TextRecord | BadDocument]:
    """Each sequence is a document, numbered by the line of its header; case (soft masking) is dropped."""
    header, parts, n_bytes = 1, list[bytes](), 0
    begun = False
    for number, line in enumerate(_lines(chunks, file), start=1):
        if line.startswith(b">"):
            if begun:
                yield _sequence(header, parts)
            header, parts, n_bytes, begun = number, [], 0, True
        elif line.strip():
            parts.append(line.strip())
            n_bytes += len(line)
            begun = True
            if n_bytes > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{file}:{header}: a sequence of more than {MAX_DOCUMENT_BYTES:,} bytes")
    if begun:
        yield _sequence(header, parts)


def _sequence(header: int, parts: list[bytes]) -> TextRecord | BadDocument:
    data = b"".join(parts).upper()
    unknown = data.translate(None, BASES.encode())
    if unknown:
        where = data.index(unknown[:1]) + 1
        problem = f"position {where:,} of the sequence is {chr(unknown[0])!r}, which is none of {BASES}"
        return BadDocument(header, "unknown base", problem)
    if not data:
        return BadDocument(header, "empty", "the sequence is empty")
    return TextRecord(header, data.decode("ascii"), len(data))


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn a failure to read into a message that begins with the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or file}: cannot be read ({error.strerror or error})") from error


def _stored(file: Path) -> Iterator[bytes]:
    with readable(file), file.open("rb") as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _chunks(file: Path, on_chunk: OnChunk | None) -> Iterator[bytes]:
    """The contents of a file, decompressed if it is `.zst` or `.gz`."""
    stored = _stored(file) if on_chunk is None else _told(_stored(file), on_chunk)
    if file.name.lower().endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        return _decompressed(stored, file, "zstd", decompressor.decompressobj)
    if file.name.lower().endswith(".gz"):
        return _decompressed(stored, file, "gzip", lambda: zlib.decompressobj(wbits=31))
    return stored


def _told(chunks: Iterator[bytes], on_chunk: OnChunk) -> Iterator[bytes]:
    for chunk in chunks:
        on_chunk(chunk)
        yield chunk


def _decompressed(chunks: Iterator[bytes], file: Path, kind: str, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress one or several frames; `begin` makes the decompression object of one.

    The libraries' stream readers take the end of the file for the end of the text (zstd); only the
    decompression object says whether the last frame was complete.
    """
    frame = None
    for chunk in chunks:
        rest = chunk
        while rest:
            frame = frame or begin()
            try:
                yield frame.decompress(rest)
            except (zstandard.ZstdError, zlib.error) as error:
                raise ValueError(f"{file}: damaged {kind} data ({error})") from error
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise ValueError(f"{file}: the {kind} data is truncated; copy or download the file again")


def _bounded(chunks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{file}: a document of more than {MAX_DOCUMENT_BYTES:,} bytes")
        yield chunk


def _lines(chunks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    """Split a stream of bytes at line feeds."""
    parts: list[bytes] = []
    n_bytes = 0
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        n_bytes += len(head)
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{file}: a line of more than {MAX_DOCUMENT_BYTES:,} bytes")
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts, n_bytes = [rest[-1]], len(rest[-1])
    last = b"".join(parts)
    if last:
        yield last


def find_text_files(path: Path, suffixes: Sequence[str]) -> tuple[list[tuple[str, Path]], int]:
    """Files below a folder (or the one file) of the given kinds, and the number of other files.

    Files are sorted pairs (name relative to the folder, path); hidden entries are left out. Raises
    ValueError that begins with the path, or OSError.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    supported = ", ".join(suffixes)
    if not path.is_dir():
        if not path.name.lower().endswith(tuple(suffixes)):
            raise ValueError(f"{path}: not a file of a supported kind ({supported})")
        return [(path.name, path)], 0
    found, n_ignored = [], 0
    for folder, subfolders, names in os.walk(path, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        n_ignored += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        for name in names:
            file = Path(folder) / name
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                found.append((file.relative_to(path).as_posix(), file))
            else:
                n_ignored += not name.startswith(".")
    if not found:
        raise ValueError(
            f"{path}: no file of a supported kind ({supported}) in this folder"
            + (f", only {n_ignored} others" if n_ignored else ", it is empty")
        )
    return sorted(found), n_ignored


def _raise(error: OSError) -> None:
    raise error
