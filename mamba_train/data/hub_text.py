"""Texts of a dataset that the `datasets` library can stream: by a name on the hub, or a local folder.

Local files are the first choice (`text_files`): they are read faster and their bytes are hashed. Here the
library decides how files become rows; each of its shards (files) is one input, so that the work can be
spread and a killed group begins again at the start of its shard.
"""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_train.config_data import DataConfig
from mamba_train.data.documents import Split
from mamba_train.data.remote_files import Attempts, Patience
from mamba_train.data.text_files import WHOLE, BadDocument, Fields, Part, TextRecord, records_of

HUB_PREFIX = "hf:"
NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


@dataclass(frozen=True)
class HubText:
    """One part of a streamed dataset: shard `shard` of `n_shards` of the library's own."""

    name: str
    config: str | None
    revision: str | None
    hub_split: str
    shard: int
    n_shards: int

    def label(self) -> str:
        """How messages and records call it."""
        return f"hf:{self.name}/{self.hub_split}/{self.shard + 1}-of-{self.n_shards}"


def commit_of(name: str, revision: str | None) -> str:
    """The commit of a dataset of the hub that a branch, a tag or null (the main branch) stands for now."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, revision=revision).sha)


def hub_options(data: DataConfig, place: str, option: str) -> dict[str, Any]:
    """The options of `open_hub` that a config names, for a place hf:NAME at the commit of now.

    Without the commit the text could change between two starts of a run. Raises ValueError that begins with `option`.
    """
    options = {"config": data.hub_config, "revision": data.hub_revision, "split": data.hub_split}
    name = place.removeprefix(HUB_PREFIX)
    if place.startswith(HUB_PREFIX) and not Path(name).exists():
        try:
            options["revision"] = commit_of(name, data.hub_revision)
        except Exception as error:  # the library raises many kinds: no such name, no network
            reason = " ".join(str(error).split())
            raise ValueError(f"{option}={place}: its commit cannot be looked up ({reason})") from error
    return options


def open_hub(name: str, split: Split, options: dict[str, Any], option: str = "--input") -> list[HubText]:
    """The parts of a dataset. options: `config`, `revision`, `split` (null: as `split`).

    Raises ValueError that begins with `option`.
    """
    hub_split = options.get("split") or split
    whole = HubText(name, options.get("config"), options.get("revision"), hub_split, 0, 1)
    n_shards = _stream(whole, option).num_shards
    return [HubText(name, whole.config, whole.revision, hub_split, shard, n_shards) for shard in range(n_shards)]


def read_hub(
    part: HubText, fields: Fields, chosen: Part = WHOLE, patience: Patience | None = None
) -> Iterator[TextRecord | BadDocument]:
    """The chosen documents of one part, numbered from 1.

    patience: with it, a connection that fails is opened again, and the rows that came before are left out.
    """
    opened = (row for row in _rows(part, fields, patience) if row[0] in chosen)
    yield from records_of(opened, fields)


def _open(part: HubText, fields: Fields) -> Any:
    """The rows of a part, with the columns that are asked for."""
    stream = _stream(part)
    columns = {key.split(".")[0] for key in (fields.text_key, fields.label_key) if key}
    if stream.column_names is not None:
        missing = sorted(columns - set(stream.column_names))
        if missing:
            there = ", ".join(stream.column_names)
            raise ValueError(f"{part.label()}: no column {missing[0]!r}, only {there}")
        stream = stream.select_columns(sorted(columns))
    if part.n_shards > 1:
        stream = stream.shard(num_shards=part.n_shards, index=part.shard)
    return stream


def _rows(part: HubText, fields: Fields, patience: Patience | None) -> Iterator[tuple[int, Any]]:
    attempts = None if patience is None else Attempts(part.label(), patience)
    n_read = 0
    while True:
        try:
            stream = _open(part, fields)
        except ValueError as error:
            if attempts is None or not _may_pass(error):
                raise
            attempts.failed(str(error))
            continue
        try:
            for number, row in enumerate(stream, start=1):
                if number > n_read:
                    n_read = number
                    if attempts is not None:
                        attempts.succeeded()
                    yield number, row
            return
        except Exception as error:  # the library raises many kinds: a line that is no JSON, the network
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if attempts is None or not _may_pass(error):
                raise ValueError(f"{part.label()}: cannot be read beyond row {n_read} ({reason})") from error
            attempts.failed(reason)


def _may_pass(error: BaseException) -> bool:
    """Whether an error, or what caused it, is one of the network."""
    library = type(error).__module__.partition(".")[0]
    is_network = isinstance(error, (ConnectionError, TimeoutError)) or library in NETWORK_LIBRARIES
    cause = error.__cause__ or error.__context__
    return is_network or (cause is not None and _may_pass(cause))


def _stream(part: HubText, option: str = "--input") -> Any:
    whole = (part.name, part.config, part.hub_split, part.revision)
    try:
        with _asking:  # many lanes are opened at once
            return _load(*whole) if Path(part.name).exists() else _load_once(*whole)
    except Exception as error:  # the library raises many kinds: no such name, no such split, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"{option} hf:{part.name}: cannot be opened, split {part.hub_split!r} ({reason})") from error


def _load(name: str, config: str | None, split: str, revision: str | None) -> Any:
    # Here, because the import takes a second that local files need not wait for.
    from datasets import load_dataset

    return load_dataset(name, config, split=split, revision=revision, streaming=True)


# The library asks the hub each time, which takes many questions badly; at a commit the answer stays the same.
_load_once = functools.lru_cache(maxsize=16)(_load)
_asking = threading.Lock()
