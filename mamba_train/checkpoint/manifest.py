"""The manifest: what files a checkpoint has, and the proof that they are what was written."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mamba_train.checkpoint import layout

FORMAT_VERSION = 1
_REQUIRED = (layout.STATE, layout.CONFIG)


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or is not what was written; the message names the file."""


@dataclass(frozen=True)
class FileRecord:
    """One file: its size and the hash of its bytes (hexadecimal)."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json; keys of `files` are paths relative to the checkpoint, with slashes."""

    step: int
    files: dict[str, FileRecord]
    fingerprints: dict[str, str]
    format_version: int = FORMAT_VERSION

    def files_in(self, folder: str) -> list[str]:
        """Tensor files of one sub-folder, in the order of their names."""
        return sorted(n for n in self.files if n.startswith(f"{folder}/") and n.endswith(".safetensors"))

    def to_text(self) -> str:
        """JSON that carries its own hash, so that damage to the manifest itself is seen too."""
        content = asdict(self)
        content["manifest_sha256"] = hashlib.sha256(_dump(content).encode()).hexdigest()
        return _dump(content)


def _dump(content: dict[str, object]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def parse(data: bytes) -> Manifest:
    """The manifest in these bytes; raises DamagedCheckpoint if a single one of them changed."""
    try:
        content = json.loads(data)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            manifest = Manifest(content["step"], files, content["fingerprints"], version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{layout.MANIFEST}: not readable ({error})") from error
    if version != FORMAT_VERSION:
        raise DamagedCheckpoint(
            f"{layout.MANIFEST}: format version {version}, this program reads version {FORMAT_VERSION}"
        )
    if manifest.to_text().encode() != data:
        raise DamagedCheckpoint(f"{layout.MANIFEST}: its bytes are not the ones that were written")
    return manifest


def read_manifest(checkpoint: Path) -> Manifest:
    """Manifest of a checkpoint folder; raises DamagedCheckpoint, naming manifest.json."""
    try:
        data = (checkpoint / layout.MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{layout.MANIFEST}: missing") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{layout.MANIFEST}: cannot be read ({error.strerror})") from error
    return parse(data)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, paths: Sequence[Path]) -> dict[str, FileRecord]:
    """Size and hash of some files under a folder, by their path relative to it."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        hashes = list(pool.map(_hash_file, paths))
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256)
        for path, sha256 in zip(paths, hashes, strict=True)
    }


def _file_problem(checkpoint: Path, name: str, record: FileRecord, with_hashes: bool) -> str | None:
    path = checkpoint / name
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            return f"{name}: {size_bytes} bytes, {record.size_bytes} were written"
        if with_hashes and _hash_file(path) != record.sha256:
            return f"{name}: its bytes are not the ones that were written (sha256 differs)"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    return None


def find_problems(
    checkpoint: Path, *, with_hashes: bool = True, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """What is wrong with a checkpoint folder, one sentence per file that begins with its name.

    `with_hashes=False` looks at names and sizes only (a truncation, not a flipped bit); `wanted` picks
    the files to look at by their name. Files that the manifest does not list are not part of the
    checkpoint and are ignored.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedCheckpoint as error:
        return [str(error)]
    problems: list[str | None] = []
    if layout.parse_step(checkpoint.name) not in (None, manifest.step):
        problems.append(f"{layout.MANIFEST}: of step {manifest.step}, in a folder named {checkpoint.name}")
    problems += [f"{name}: not in the manifest" for name in _REQUIRED if name not in manifest.files]
    if not manifest.files_in(layout.MODEL):
        problems.append(f"{layout.MODEL}/: no tensor file in the manifest")
    files = [(name, record) for name, record in sorted(manifest.files.items()) if wanted(name)]
    with ThreadPoolExecutor() as pool:
        problems += pool.map(lambda file: _file_problem(checkpoint, file[0], file[1], with_hashes), files)
    return [problem for problem in problems if problem is not None]
