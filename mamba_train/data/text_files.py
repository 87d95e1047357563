"""Texts from files (`.txt`, `.jsonl` plain or compressed, `.parquet`, FASTA), read as a stream.

A document that cannot be used is yielded as a `BadDocument`, so that one policy decides about all of
them (`mamba_train.data.bad_documents`). A file that cannot be read to its end raises ValueError with
the file and the reason: text that vanished silently would be found, if ever, after the training.

Memory is bounded by the longest document, not by the size of a file (a `.txt` file is one document),
and a document by `stored_files.MAX_DOCUMENT_BYTES`.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from mamba_train.data import stored_files
from mamba_train.data.stored_files import (
    OnChunk,
    StoredFile,
    bounded,
    content_bytes,
    lines_of,
    readable,
    stored_bytes,
    without_lines,
)

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
FASTA_SUFFIXES = tuple(name + packed for name in (".fasta", ".fa", ".fna") for packed in ("", ".gz", ".zst"))
BASES = "ACGTNRYSWKMBDHVU"  # the four, any, the other ambiguity codes of IUPAC, and uracil


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


@dataclass(frozen=True)
class Part:
    """Documents of a file by their number (of the line, row or sequence, from 1): from `first` on, those whose number,
    counted from 0, has one of these residues modulo `stride`.
    """

    stride: int = 1
    residues: frozenset[int] = frozenset({0})
    first: int = 1

    def __contains__(self, number: int) -> bool:
        return number >= self.first and (number - 1) % self.stride in self.residues


WHOLE = Part()


def read_texts(
    file: StoredFile, fields: Fields, on_chunk: OnChunk | None = None, part: Part = WHOLE
) -> Iterator[TextRecord | BadDocument]:
    """All documents of a part of a file in their order; `on_chunk` is called with each piece of the stored bytes.

    What lies before the part is decompressed, but not looked at. Raises ValueError that begins with the file if it
    cannot be read to its end.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(file, fields, on_chunk, part)
    elif name.endswith(FASTA_SUFFIXES):
        yield from (record for record in _fasta(content_bytes(file, on_chunk), file) if record.number in part)
    elif name.endswith(".txt"):
        if 1 in part:
            yield from _convert([(1, b"".join(bounded(content_bytes(file, on_chunk), file)))], _text_record)
    else:
        chunks = without_lines(content_bytes(file, on_chunk), part.first - 1)
        chosen = itertools.cycle(number in part for number in range(part.first, part.first + part.stride))
        lines = itertools.compress(enumerate(lines_of(chunks, file), start=part.first), chosen)
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
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = _python_json(line)
    if not isinstance(row, dict):
        raise _Unusable("wrong type", f"expected a JSON object, got {_kind(row)}")
    return record_of(row, fields)


def _python_json(line: bytes) -> Any:
    """Slower; takes more (NaN, a mark of byte order, half of a surrogate pair), and says better what is wrong."""
    text = _decoded(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Unusable("invalid JSON", f"invalid JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise _Unusable("invalid JSON", f"unusable JSON ({error})") from None


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
            there = ", ".join(repr(name) for name in value) if isinstance(value, dict) else _kind(value)
            raise _Unusable("no field", f"no field {key!r} ({option}), only {there or 'an empty object'}")
        value = value[part]
    if not isinstance(value, str):
        raise _Unusable("wrong type", f"field {key!r} ({option}) must be a string, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is called; numbers alike, as orjson takes integers of more than 64 bits for floats."""
    return "a number" if type(value) in (int, float) else type(value).__name__


def _parquet(
    file: StoredFile, fields: Fields, on_chunk: OnChunk | None, part: Part
) -> Iterator[TextRecord | BadDocument]:
    # Here, because importing it takes longer than reading a small file of another kind.
    import pyarrow
    import pyarrow.parquet

    if on_chunk is not None:  # columns are read out of order, so the stored bytes need a reading of their own
        for _ in stored_bytes(file, on_chunk):
            pass
    keys = [fields.text_key, *([fields.label_key] if fields.label_key else [])]
    columns = sorted({key.split(".")[0] for key in keys})
    try:
        with readable(file), pyarrow.parquet.ParquetFile(file) as table:
            missing = [column for column in columns if column not in table.schema_arrow.names]
            if missing:
                there = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{file}: no column {missing[0]!r} ({fields.text_option}), only {there}")
            groups, n_before = _row_groups(table, part.first)
            batches = table.iter_batches(batch_size=64, row_groups=groups, columns=columns)
            rows = (batch.slice(i, 1) for batch in batches for i in range(batch.num_rows))
            chosen = ((number, row) for number, row in enumerate(rows, start=n_before + 1) if number in part)
            yield from _convert(chosen, lambda row: record_of(_row(row), fields))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: damaged parquet data ({' '.join(str(error).split())})") from error


def _row_groups(table: Any, first: int) -> tuple[list[int], int]:
    """The groups of rows from the one on that has row `first`, and how many rows lie before them."""
    n_before = 0
    for group in range(table.num_row_groups):
        n_rows = table.metadata.row_group(group).num_rows
        if n_before + n_rows >= first:
            return list(range(group, table.num_row_groups)), n_before
        n_before += n_rows
    return [], n_before


def _row(batch: Any) -> dict[str, Any]:
    """The only row of a batch of Arrow columns."""
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        raise _Unusable("not UTF-8", f"not valid UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def _fasta(chunks: Iterator[bytes], file: StoredFile) -> Iterator[TextRecord | BadDocument]:
    """Each sequence is a document, numbered by the line of its header; case (soft masking) is dropped."""
    header, parts, n_bytes = 1, list[bytes](), 0
    begun = False
    for number, line in enumerate(lines_of(chunks, file), start=1):
        if line.startswith(b">"):
            if begun:
                yield _sequence(header, parts)
            header, parts, n_bytes, begun = number, [], 0, True
        elif line.strip():
            parts.append(line.strip())
            n_bytes += len(line)
            begun = True
            if n_bytes > stored_files.MAX_DOCUMENT_BYTES:
                raise ValueError(f"{file}:{header}: a sequence of more than {stored_files.MAX_DOCUMENT_BYTES:,} bytes")
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
