"""Documents from a local file or folder: which there are, and which of them are held out."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_train.config_data import BadDocuments
from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.documents import Document, DuplicateFilter, Log, cut_tail, in_validation
from mamba_train.data.stored_files import find_text_files, readable
from mamba_train.data.text_files import TEXT_SUFFIXES, Fields, read_texts

MIN_DOCUMENTS_PER_SPLIT = 8  # fewer on one side: the split by document is too coarse


class LocalSource:
    """The documents of `path`, a folder (searched recursively, hidden entries left out) or one file."""

    def __init__(
        self,
        path: str | None,
        text_key: str,
        bad_documents: BadDocuments = BadDocuments.error,
        max_bad_share: float = 0.0,
        log: Log = lambda line: None,
    ) -> None:
        if not path:
            raise ValueError("data.path is not set: data.source=local needs data.path=FOLDER_OR_FILE")
        self._path = Path(path).expanduser()
        self._text_key = text_key
        self._bad_documents, self._max_bad_share, self._log = bad_documents, max_bad_share, log
        self._skipped: dict[str, dict[str, int]] = {}
        try:
            with readable(self._path):
                self._files, self._n_ignored = find_text_files(self._path, TEXT_SUFFIXES)
                self._stats = [file.stat() for _, file in self._files]
        except ValueError as error:
            raise ValueError(f"data.path={error}") from error
        self._validation_fraction = 0.0
        self._by_document = True

    def identity(self) -> dict[str, Any]:
        """The list of files with their sizes and modification times."""
        files = [
            [name, stat.st_size, stat.st_mtime_ns] for (name, _), stat in zip(self._files, self._stats, strict=True)
        ]
        return {"kind": "local", "files": files, "text_key": self._text_key}

    def record(self) -> dict[str, Any]:
        """Names (relative to `data.path`) and sizes of the files, and what was left out of each."""
        files = [[name, stat.st_size] for (name, _), stat in zip(self._files, self._stats, strict=True)]
        return {"kind": "local", "files": files, "n_ignored_files": self._n_ignored, "skipped": self._skipped}

    def choose_split(self, validation_fraction: float, log: Log) -> str:
        """Hold out whole documents, or the end of each one where there are too few of them.

        Reads only until both splits are known to have enough documents.
        """
        if self._n_ignored:
            log(f"data: {self._n_ignored} files in {self._path} are not {', '.join(TEXT_SUFFIXES)}: ignored")
        self._validation_fraction = validation_fraction
        counts = {True: 0, False: 0}
        unseen = DuplicateFilter(Counter())
        for name, ordinal, text in self._texts(self._filter(lambda line: None)):
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
        bad = self._filter(self._log)
        for name, ordinal, text in self._texts(bad):
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
        bad.check_share(f"data.path={self._path}")
        self._skipped = {name: dict(counts) for name, counts in bad.counts.items()}
        dropped.update(bad.totals())
        self._log = lambda line: None  # all of it was said: another reading finds the same

    def _filter(self, log: Log) -> BadDocumentFilter:
        return BadDocumentFilter(self._bad_documents, self._max_bad_share, lambda line: log(f"data: {line}"))

    def _texts(self, bad: BadDocumentFilter) -> Iterator[tuple[str, int, str]]:
        """(relative path, line number from 1, text) of every usable document, as it is in the files."""
        for name, file in self._files:
            try:
                for record in bad.usable(name, file, read_texts(file, Fields(self._text_key))):
                    yield name, record.number, record.text
            except ValueError as error:
                raise ValueError(f"data.path: {error}") from error
