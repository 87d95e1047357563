"""Documents from the Python standard library: real text that every machine has, with no download.

One document per source file and one per built-in or extension module (its docstrings). Whole packages
are held out for validation, never single files of one, because the files of a package share names,
phrases and copied code.
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mamba_train.data import module_docstrings
from mamba_train.data.documents import Document, DuplicateFilter, Log, stable_hash

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Tables of code points, generated help texts, a joke of four lines: fine to learn from, but a
# validation loss on them would say little about text.
NEVER_HELD_OUT = frozenset({"encodings", "pydoc_data", "__phello__"})
DOCSTRINGS_TIMEOUT_SECONDS = 60


def stdlib_root() -> Path:
    """The folder that holds the sources of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _is_build_record(name: str) -> bool:
    """Whether a file or folder holds the variables of this interpreter's build, not text."""
    return name.startswith(("_sysconfigdata", "config-"))


def _source_files(root: Path) -> list[str]:
    """Sorted relative paths of the library's sources."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not _is_build_record(name)]
        for name in files:
            if name.endswith(".py") and not _is_build_record(name):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(found)


def _decode_source(data: bytes) -> str:
    """The text of a Python source file in the encoding that it declares, with "\\n" line ends."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n")


def choose_validation_folders(bytes_of_folder: dict[str, int], validation_fraction: float) -> frozenset[str]:
    """Choose top-level folders that hold about `validation_fraction` of all bytes.

    The folders are visited in the order of a stable hash of their names and taken while they fit; one
    alone may fill half of the target at most, so that validation is not one package. "" (the modules
    that lie in no folder) and `NEVER_HELD_OUT` are counted but never taken. At least one is taken.
    """
    target = validation_fraction * sum(bytes_of_folder.values())
    candidates = sorted(
        (name for name in bytes_of_folder if name and name not in NEVER_HELD_OUT),
        key=lambda name: stable_hash("stdlib", name),
    )
    chosen: set[str] = set()
    taken = 0
    for name in candidates:
        if bytes_of_folder[name] <= target / 2 and taken + bytes_of_folder[name] <= 1.1 * target:
            chosen.add(name)
            taken += bytes_of_folder[name]
    rest = [name for name in candidates if name not in chosen]
    if rest and taken < target / 2:  # few or only large folders: add the one that comes nearest
        chosen.add(min(rest, key=lambda name: abs(taken + bytes_of_folder[name] - target)))
    return frozenset(chosen)


class StdlibSource:
    """The standard library of the running interpreter (`root` is for tests)."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or stdlib_root()
        paths = _source_files(self._root) if self._root.is_dir() else []
        if not paths:
            raise ValueError(
                f"data.source=stdlib: this Python has no library sources in {self._root}; "
                "use data=local data.path=FOLDER with text of your own"
            )
        try:
            self._contents = {path: (self._root / path).read_bytes() for path in paths}
        except OSError as error:
            raise ValueError(f"data.source=stdlib: {error.filename}: cannot be read ({error.strerror})") from error
        self._validation: frozenset[str] = frozenset()
        self._docstrings: dict[str, str] | None = None

    def identity(self) -> dict[str, Any]:
        """The contents of all sources, and the interpreter's build, which determines the docstrings."""
        digest = hashlib.sha256()
        for path, data in self._contents.items():
            digest.update(f"{path}\0{len(data)}\0".encode())
            digest.update(data)
        return {
            "kind": "stdlib",
            "sources_sha256": digest.hexdigest(),
            "python": sys.version,
            "modules": module_docstrings.module_names(),
        }

    def record(self) -> dict[str, Any]:
        """The interpreter, and the folders that were held out."""
        return {
            "kind": "stdlib",
            "python_version": platform.python_version(),
            "n_source_files": len(self._contents),
            "n_docstring_modules": len(self._docstrings or {}),
            "validation_folders": sorted(self._validation),
        }

    def choose_split(self, validation_fraction: float, log: Log) -> str:
        """Hold out whole top-level folders."""
        self._docstrings = self._read_docstrings(log)
        sizes: Counter[str] = Counter()
        for path, data in self._contents.items():
            sizes[_folder_of(path)] += len(data)
        self._validation = choose_validation_folders(dict(sizes), validation_fraction)
        if not self._validation:
            raise ValueError(
                f"data.source=stdlib: no folder of {self._root} can be held out for validation; "
                "use data=local data.path=FOLDER"
            )
        rule = f"folders held out for validation: {', '.join(sorted(self._validation))}"
        log(f"data: {rule}")
        return rule

    def documents(self, dropped: Counter[str]) -> Iterator[Document]:
        """Sources by path, then the docstrings by module name."""
        unseen = DuplicateFilter(dropped)
        for path, data in self._contents.items():
            try:
                text = _decode_source(data)
            except (SyntaxError, UnicodeDecodeError):
                dropped["undecodable"] += 1
                continue
            if unseen.keep(text):
                yield self._document(path, _folder_of(path), text)
        for name, text in sorted((self._docstrings or {}).items()):
            if unseen.keep(text):
                # `_json` documents the same functions as the folder `json`: keep the two together.
                yield self._document(f"docstrings of {name}", name.removeprefix("_"), text)

    def _document(self, origin: str, folder: str, text: str) -> Document:
        return Document(origin, text, "validation" if folder in self._validation else "train")

    def _read_docstrings(self, log: Log) -> dict[str, str]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "docstrings.json"
                # -I and -S: neither the user's environment nor site-packages may change the text.
                subprocess.run(
                    [sys.executable, "-I", "-S", module_docstrings.__file__, str(output)],
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=DOCSTRINGS_TIMEOUT_SECONDS,
                )
                texts: dict[str, str] = json.loads(output.read_text(encoding="utf-8"))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            log(f"data: WARNING: no docstrings of built-in modules ({error}); going on without them")
            return {}
        return {name: text for name, text in texts.items() if text}


def _folder_of(path: str) -> str:
    """The top-level folder of a relative path, "" for a module that lies in none."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else ""
