"""What a document is, and the filters that every source of documents shares.

A source knows its files and which split each document belongs to; it can be read any number of times
and always yields the same documents in the same order, so one pass can train the tokenizer and the
next one write the shards.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_HERE: tuple[Split, ...] = ("train", "validation")  # the splits that a source makes of its documents
Log = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text, where it came from (`origin`, for messages and records), and its split."""

    origin: str
    text: str
    split: Split


class DocumentSource(Protocol):
    """A place that documents are read from."""

    def identity(self) -> dict[str, Any]:
        """JSON values that change whenever the documents may have changed (part of the cache key)."""

    def record(self) -> dict[str, Any]:
        """JSON values for the manifest that say where the documents came from."""

    def choose_split(self, validation_fraction: float, log: Log) -> str:
        """Decide which documents are held out; returns (and logs) the rule in words."""

    def documents(self, dropped: Counter[str]) -> Iterator[Document]:
        """All documents in their stable order; counts what was left out in `dropped`, by reason."""


def stable_hash(*parts: object) -> int:
    """A 64-bit number that depends on `parts` only, on every machine and Python version."""
    # File names that are not valid UTF-8 hold surrogates in Python.
    joined = "\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def in_validation(fraction: float, *parts: object) -> bool:
    """Whether a stable hash of `parts` falls into the held-out fraction."""
    return stable_hash(*parts) < fraction * 2**64


class DuplicateFilter:
    """Says of each text whether it is empty or was seen before, and counts it if so.

    Memory is a 16-byte digest per distinct text (about 80 bytes each in a Python set).
    """

    def __init__(self, dropped: Counter[str]) -> None:
        self._dropped = dropped
        self._seen: set[bytes] = set()

    def keep(self, text: str) -> bool:
        """True exactly once for each distinct text that has something besides white space."""
        if not text.strip():
            self._dropped["empty"] += 1
            return False
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            self._dropped["duplicate"] += 1
            return False
        self._seen.add(digest)
        return True


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Cut off about the last `fraction` of a text, at a line break if there is one near, else at a space.

    Returns (head, tail) with head + tail == text; the tail is empty when the text is too short to cut.
    """
    wanted = len(text) - int(len(text) * fraction)
    if wanted >= len(text):
        return text, ""
    for separator in ("\n", " "):
        # The break just before the wanted place is the natural one; a text whose last break lies
        # far before it would lose much more than the fraction, so look behind the place as well.
        before = text.rfind(separator, 0, wanted) + 1
        after = text.find(separator, wanted) + 1
        candidates = [place for place in (before, after) if 0 < place < len(text)]
        if candidates:
            place = min(candidates, key=lambda candidate: abs(candidate - wanted))
            if len(text) - place <= 2 * (len(text) - wanted):
                return text[:place], text[place:]
    return text[:wanted], text[wanted:]
