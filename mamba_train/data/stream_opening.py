"""What a config that streams names: files, listed once by the first rank for all, and the tokenizer.

The list is plain JSON, so that the other ranks are given it and ask neither a disk nor a server. Its order, and with it
that of the documents, is that of the names.
"""

import base64
import fnmatch
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_train.config_data import DataConfig, EncoderKind
from mamba_train.data.batches import EVERYTHING
from mamba_train.data.corpus import Corpus
from mamba_train.data.documents import Log
from mamba_train.data.encoders import fastokens_call
from mamba_train.data.hub_text import HUB_PREFIX, commit_of, hub_options
from mamba_train.data.manifest import TOKENIZER_NAME, read_manifest
from mamba_train.data.opening import OpenedData, check_held_out_tokenizer, held_out_domains
from mamba_train.data.prepare import check_prepared
from mamba_train.data.remote_files import HttpFile, Patience, is_address
from mamba_train.data.shard_job import create_once, find_inputs
from mamba_train.data.stored_files import readable
from mamba_train.data.streams import StreamFile
from mamba_train.data.text_files import TEXT_SUFFIXES
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer

HUB_FILES = "hf://datasets/"
LISTING_THREADS = 16
REMOTE_SUFFIXES = tuple(suffix for suffix in TEXT_SUFFIXES if suffix != ".parquet")


@dataclass(frozen=True)
class OpenedStream:
    """What `OpenedData` is for shards. files and stages: what `StreamSource` takes; folder: of the tokenizer."""

    files: dict[str, list[StreamFile]]
    tokenizer: TextTokenizer
    folder: Path
    stages: list[tuple[int, dict[str, float]]]
    held_out: dict[str, Path]
    validation: dict[str, Corpus]

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def size(self) -> str:
        """How much there is, in words."""
        n_files = sum(len(listed) for listed in self.files.values())
        n_bytes = sum(file.size for listed in self.files.values() for file in listed)
        return f"{n_files:,} files of text, {n_bytes:,} bytes as stored"


AnyOpened = OpenedData | OpenedStream


def list_stream(data: DataConfig, log: Log) -> dict[str, Any]:
    """The files of all sources and the tokenizer, in JSON values. Raises ValueError that begins with the key."""
    places = {f"data.sources.{name}": (name, place) for name, place in data.sources.items()}
    places = places or {"data.path": ("", data.path or "")}
    files = {name: [file.to_json() for file in _list(place, key, data, log)] for key, (name, place) in places.items()}
    tokenizer = load_tokenizer(data.tokenizer or "")
    if data.encoder is EncoderKind.fastokens:
        fastokens_call(tokenizer)  # says at once if that cannot work
    for name, path in data.validation_paths.items():
        check_prepared(Path(path).expanduser(), f"data.validation_paths.{name}={path}", data.check_hashes)
    return {"files": files, "tokenizer": base64.b64encode(tokenizer.serialised).decode("ascii")}


def open_stream(data: DataConfig, listed: dict[str, Any]) -> OpenedStream:
    """What `list_stream` found, on any rank. Raises ValueError that begins with the key."""
    tokenizer = TextTokenizer(base64.b64decode(listed["tokenizer"]), f"data.tokenizer={data.tokenizer}")
    files = {name: [StreamFile.from_json(file) for file in found] for name, found in listed["files"].items()}
    stages = [(stage.from_step, dict(stage.weights)) for stage in data.mixture] or list(EVERYTHING)
    if not data.mixture:
        files = {"": [file for found in files.values() for file in found]}
    folders = {name: Path(path).expanduser() for name, path in data.validation_paths.items()}
    held_out = {name: (folder, read_manifest(folder)) for name, folder in folders.items()}
    check_held_out_tokenizer(held_out, tokenizer.sha256)
    return OpenedStream(
        files, tokenizer, _keep(tokenizer, data.cache_dir), stages, folders, held_out_domains({}, held_out)
    )


def _keep(tokenizer: TextTokenizer, cache_dir: str) -> Path:
    """A folder that holds the tokenizer as the folders of shards do."""
    folder = Path(cache_dir).expanduser() / f"tokenizer-{tokenizer.sha256[:12]}"
    try:
        if not (folder / TOKENIZER_NAME).exists():
            folder.mkdir(parents=True, exist_ok=True)
            create_once(folder / TOKENIZER_NAME, tokenizer.serialised)  # all ranks do this
    except OSError as error:
        raise ValueError(f"data.cache_dir={cache_dir}: cannot be written ({error})") from error
    return folder


def _list(place: str, key: str, data: DataConfig, log: Log) -> list[StreamFile]:
    if is_address(place):
        return _remote(place, key, data)
    if place.startswith(HUB_FILES):
        return _of_hub(place, key)
    inputs, paths = find_inputs([place], "train", TEXT_SUFFIXES, hub_options(data, place, key), log, key)
    return [
        StreamFile(entry.name, 0, place, entry.hub) if entry.hub else _local(entry.name, paths[entry.name])
        for entry in inputs
    ]


def _local(name: str, path: Path) -> StreamFile:
    with readable(path):
        known = path.stat()
    return StreamFile(name, known.st_size, str(path), modified=known.st_mtime)


def _remote(pattern: str, key: str, data: DataConfig) -> list[StreamFile]:
    patience = Patience(data.network_retries, data.network_timeout_seconds)
    addresses = expand(pattern)
    for address in addresses:
        _check_suffix(address, HttpFile(address, 0, patience).name, key)
    try:
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            found = list(pool.map(lambda address: HttpFile(address, 0, patience).find_size(), addresses))
    except ValueError as error:
        raise ValueError(f"{key}={error}") from error
    return [StreamFile(file.address, file.size, file.address) for file in found]


def expand(pattern: str) -> list[str]:
    """The addresses of a pattern: `{00..29}` stands for each of these numbers, as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    return [found for n in numbers for found in expand(pattern[: match.start()] + n + pattern[match.end() :])]


def _check_suffix(address: str, name: str, key: str) -> None:
    if not name.lower().endswith(REMOTE_SUFFIXES):
        kinds = ", ".join(REMOTE_SUFFIXES)
        raise ValueError(f"{key}={address}: read over the network are {kinds}; for others {HUB_PREFIX}NAME, or a copy")


def _of_hub(place: str, key: str) -> list[StreamFile]:
    """Files of a dataset, by their addresses at the commit of now: hf://datasets/OWNER/NAME[@REVISION][/GLOB]."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+))?", place.removeprefix(HUB_FILES))
    if match is None:
        raise ValueError(f"{key}={place}: expected {HUB_FILES}OWNER/NAME[@REVISION][/GLOB]")
    name, revision, pattern = match.groups()
    try:
        commit = commit_of(name, revision)
        entries = list(HfApi().list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset"))
    except Exception as error:  # the library raises many kinds: no such name, no network
        raise ValueError(f"{key}={place}: cannot be listed ({' '.join(str(error).split())})") from error
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    chosen = sorted((file.path, file.size) for file in files if fnmatch.fnmatchcase(file.path, pattern or "*"))
    chosen = [(path, size) for path, size in chosen if path.lower().endswith(REMOTE_SUFFIXES)]
    if not chosen:
        raise ValueError(f"{key}={place}: none of its {len(files)} files is one of {', '.join(REMOTE_SUFFIXES)}")
    return [
        StreamFile(f"{path}@{commit}", size, hf_hub_url(name, path, repo_type="dataset", revision=commit))
        for path, size in chosen
    ]
