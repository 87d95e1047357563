"""Files as bytes and lines: finding them, reading them in pieces, decompressing them to their very end."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import zstandard

CHUNK_BYTES = 1 << 17  # small, because a compressed chunk may hold a thousand times as much
MAX_DOCUMENT_BYTES = 2 << 30
OnChunk = Callable[[bytes], object]


class RemoteFile(Protocol):
    """A file that is read over the network; its text form is its address."""

    @property
    def name(self) -> str:
        """The last part of the address."""

    def chunks(self) -> Iterator[bytes]:
        """The stored bytes. Raises ValueError that begins with the address."""


StoredFile = Path | RemoteFile


@contextmanager
def readable(file: StoredFile) -> Iterator[None]:
    """Turn a failure to read into a message that begins with the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or file}: cannot be read ({error.strerror or error})") from error


def stored_bytes(file: StoredFile, on_chunk: OnChunk | None = None) -> Iterator[bytes]:
    """The bytes of a file as they are stored, in pieces; `on_chunk` is called with each of them."""
    for chunk in _from_disk(file) if isinstance(file, Path) else file.chunks():
        if on_chunk is not None:
            on_chunk(chunk)
        yield chunk


def _from_disk(file: Path) -> Iterator[bytes]:
    with readable(file), file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def content_bytes(file: StoredFile, on_chunk: OnChunk | None = None) -> Iterator[bytes]:
    """The contents of a file, decompressed if it is `.zst` or `.gz`; `on_chunk` gets the stored bytes."""
    stored = stored_bytes(file, on_chunk)
    if file.name.lower().endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        return _decompressed(stored, file, "zstd", decompressor.decompressobj)
    if file.name.lower().endswith(".gz"):
        return _decompressed(stored, file, "gzip", lambda: zlib.decompressobj(wbits=31))
    return stored


def _decompressed(chunks: Iterator[bytes], file: StoredFile, kind: str, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress one or several frames; `begin` makes the decompression object of one.

    The libraries' stream readers take the end of the file for the end of the text (zstd); only the
    decompression object says whether the last frame was complete.
    """
    frame, is_empty = None, True
    for chunk in chunks:
        rest, is_empty = chunk, False
        while rest:
            frame = frame or begin()
            try:
                yield frame.decompress(rest)
            except (zstandard.ZstdError, zlib.error) as error:
                raise ValueError(f"{file}: damaged {kind} data ({error})") from error
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None or is_empty:  # even no text at all takes some bytes
        raise ValueError(f"{file}: the {kind} data is truncated; copy or download the file again")


def bounded(chunks: Iterator[bytes], file: StoredFile) -> Iterator[bytes]:
    """The same pieces; raises ValueError if they are more than one document may have."""
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{file}: a document of more than {MAX_DOCUMENT_BYTES:,} bytes")
        yield chunk


def without_lines(chunks: Iterator[bytes], n: int) -> Iterator[bytes]:
    """The same stream of bytes without its first n lines, which are only counted: faster than to split them."""
    for chunk in chunks:
        if n == 0:
            yield chunk
            continue
        n_here = chunk.count(b"\n")
        if n_here < n:
            n -= n_here
            continue
        place = 0
        while n:
            place = chunk.index(b"\n", place) + 1
            n -= 1
        yield chunk[place:]


def lines_of(chunks: Iterator[bytes], file: StoredFile) -> Iterator[bytes]:
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
