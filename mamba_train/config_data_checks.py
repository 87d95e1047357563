"""Checks of the section `data` of a composed config; see `mamba_train.config_checks`."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from mamba_train.config import Config
from mamba_train.config_data import DataConfig, DataSource, SyntheticTask, patience_seconds

Problem = tuple[str, object, str]  # key, value, what is wrong with it and what is accepted
LONGEST_SECONDS = 365 * 86400  # what clocks and locks can take is not much more


def data_problems(config: Config) -> Iterable[Problem]:
    """What of `data` cannot work."""
    data = config.data
    if data.source is DataSource.local:
        if not data.path:
            yield (
                "data.path",
                data.path,
                "expected a folder or file with text (.txt, .jsonl, .jsonl.zst, .jsonl.gz, .parquet)",
            )
        elif not Path(data.path).expanduser().exists():
            yield "data.path", data.path, "there is no such file or folder"
    elif data.source is DataSource.shards:
        yield from _shards(data)
    elif data.source is DataSource.stream:
        yield from _stream(config)
    elif data.source is DataSource.synthetic:
        yield from _task(data)
    elif data.path:
        yield "data.path", data.path, f"data.source={data.source} reads no path; use data=local"
    yield from _of_streams(data)
    yield from _loading(data)
    if not 0 < data.validation_fraction < 1:
        yield "data.validation_fraction", data.validation_fraction, "expected more than 0 and less than 1"
    # 256 bytes and the end of document are always in a byte-level vocabulary.
    is_text = data.source is not DataSource.synthetic
    if is_text and data.task is not None:
        yield "data.task", data.task, f"expected null with data.source={data.source}; use data=TASK"
    if is_text and data.tokenizer is None and not 257 <= data.vocab_size <= 2**31 - 1:
        yield "data.vocab_size", data.vocab_size, "expected at least 257 (256 bytes and the end of document)"
    if data.tokenizer is not None and not Path(data.tokenizer).expanduser().is_file():
        yield "data.tokenizer", data.tokenizer, "there is no such file; expected a tokenizer.json"


def _task(data: DataConfig) -> Iterable[Problem]:
    """A task must fit into each length that it is trained or tested at."""
    for key in ("path", "tokenizer"):
        if getattr(data, key) is not None:
            yield f"data.{key}", getattr(data, key), "expected null: a synthetic task reads no text"
    if data.task is None:
        tasks = ", ".join(SyntheticTask)
        yield "data.task", None, f"expected one of {tasks}"
        return
    if data.reset_state_at_documents or data.mask_loss_at_documents:
        yield "data.reset_state_at_documents", data.reset_state_at_documents, "expected false: there are no documents"
    least_length, least_vocab = {
        SyntheticTask.induction_heads: (3, 3),
        SyntheticTask.selective_copying: (2 * data.task_items, 3),
        SyntheticTask.mqar: (3 * data.task_items, 2 * data.task_items + 2),
    }[data.task]
    if not least_vocab <= data.vocab_size <= 20_000:
        yield "data.vocab_size", data.vocab_size, f"expected {least_vocab} to 20000 for data.task={data.task}"
    for key, length in (
        ("data.sequence_length", data.sequence_length),
        *(("data.test_lengths", length) for length in data.test_lengths),
    ):
        if length < least_length:
            yield key, length, f"expected at least {least_length} for data.task={data.task}"


SHARDS_EXPECTED = "expected a folder of token shards, made by `python -m data_prep tokenize`"


def _shards(data: DataConfig) -> Iterable[Problem]:
    if data.sources and data.path:
        yield "data.path", data.path, "expected null beside data.sources; give the folder a name there"
    elif not data.sources and (not data.path or not Path(data.path).expanduser().is_dir()):
        yield "data.path", data.path, f"{SHARDS_EXPECTED}; for several of them +data.sources.NAME=FOLDER"
    for name, path in data.sources.items():
        if not name or "/" in name:
            yield f"data.sources.{name}", path, "expected a name without /"
        elif not Path(path).expanduser().is_dir():
            yield f"data.sources.{name}", path, SHARDS_EXPECTED


HUB_OPTIONS = "hub_config hub_revision hub_split"
REMOTE = r"https?://|hf:"  # how a place begins that is not on this machine


def _places(data: DataConfig) -> dict[str, str | None]:
    """What is read, by key."""
    return {"data.path": data.path, **{f"data.sources.{name}": place for name, place in data.sources.items()}}


def _stream(config: Config) -> Iterable[Problem]:
    data, batch = config.data, config.training.global_batch_size
    if data.tokenizer is None:
        yield "data.tokenizer", None, "expected a tokenizer.json: a stream has no text to train one on beforehand"
    if data.sources and data.path:
        yield "data.path", data.path, "expected null beside data.sources; give the place a name there"
    elif not data.sources and not data.path:
        yield "data.path", data.path, "expected files, a folder, a glob, an address (http...) or hf:NAME"
    for key, place in _places(data).items():
        is_here = place and not re.match(REMOTE, place) and not re.search(r"[*?\[]", place)
        if is_here and not Path(str(place)).expanduser().exists():
            yield key, place, "there is no such file or folder"
    if data.lanes is not None and (data.lanes < 1 or data.lanes % batch):
        yield "data.lanes", data.lanes, f"expected null or a multiple of training.global_batch_size ({batch})"
    if data.shuffle_documents < 0:
        yield "data.shuffle_documents", data.shuffle_documents, "expected 0 or more"
    if data.network_retries < 0:
        yield "data.network_retries", data.network_retries, "expected 0 or more"
    if data.network_timeout_seconds <= 0:
        yield "data.network_timeout_seconds", data.network_timeout_seconds, "expected more than 0"
    limit, patience = config.watchdog.data_seconds, patience_seconds(data)
    if patience > LONGEST_SECONDS:
        problem = (
            f"expected fewer, or a shorter data.network_timeout_seconds ({data.network_timeout_seconds:g}): together "
            f"at most {LONGEST_SECONDS:,} s of waiting for a server (a year)"
        )
        yield "data.network_retries", data.network_retries, problem
    is_remote = any(re.match(REMOTE, place or "") for place in _places(data).values())
    if is_remote and limit is not None and limit < patience:
        problem = (
            f"expected null or at least {patience:g}: so long may data.network_retries={data.network_retries} with "
            f"data.network_timeout_seconds={data.network_timeout_seconds:g} wait for a server"
        )
        yield "watchdog.data_seconds", limit, problem
    if data.mixture and not data.repeat:
        yield "data.repeat", data.repeat, "expected true with data.mixture: its sources do not end together"
    for number, stage in enumerate(data.mixture):
        for name in stage.weights:
            if name not in data.sources:
                yield (
                    f"data.mixture[{number}].weights",
                    name,
                    "expected a name of data.sources: a stream has no domains",
                )
    for key in ("cache_group_mib", "cache_workers"):
        if getattr(data, key) < 1:
            yield f"data.{key}", getattr(data, key), "expected 1 or more"
    if data.cache_shards:
        yield from _cached(data)
    if data.continue_lanes and (data.lanes not in (None, batch) or data.mixture):
        problem = f"expected false, or data.lanes={batch} (training.global_batch_size) and no data.mixture"
        yield "data.continue_lanes", data.continue_lanes, problem


def _of_streams(data: DataConfig) -> Iterable[Problem]:
    """What would change nothing: `data.repeat=false` for shards is a run that does not end with the text, either."""
    if data.source is not DataSource.stream:
        names = f"lanes repeat shuffle_files shuffle_documents continue_lanes cache_shards {HUB_OPTIONS}"
        reason = f"data.source={data.source} does not read it, data=stream does"
    elif not any(re.match(r"hf:(?!//)", place or "") for place in _places(data).values()):
        names, reason = HUB_OPTIONS, "it is for hf:NAME (the commit of an address is in it: hf://.../NAME@COMMIT)"
    else:
        return
    for name in names.split():
        value, usual = getattr(data, name), getattr(DataConfig(), name)
        if value != usual:
            yield f"data.{name}", value, f"expected {'null' if usual is None else str(usual).lower()}: {reason}"


def _cached(data: DataConfig) -> Iterable[Problem]:
    if data.sources and not data.mixture:
        yield "data.mixture", data.mixture, "expected weights for data.sources with data.cache_shards=true"
    for key in ("lanes", "continue_lanes", "shuffle_files", "shuffle_documents"):
        if getattr(data, key):
            yield f"data.{key}", getattr(data, key), "not used with data.cache_shards=true: leave it out"
    if not data.repeat:
        yield "data.repeat", data.repeat, "expected true with data.cache_shards=true"
    for key, place in _places(data).items():
        if re.match(r"https?://|hf://", place or ""):
            yield key, place, "expected files or hf:NAME with data.cache_shards=true"


def _loading(data: DataConfig) -> Iterable[Problem]:
    if data.sources and data.source not in (DataSource.shards, DataSource.stream):
        yield "data.sources", data.sources, f"data.source={data.source} reads none; use data=shards data.path=null"
    for name, path in data.validation_paths.items():
        if not Path(path).expanduser().is_dir():
            yield f"data.validation_paths.{name}", path, SHARDS_EXPECTED
    for number, stage in enumerate(data.mixture):
        key = f"data.mixture[{number}]"
        if number == 0 and stage.from_step != 0:
            yield f"{key}.from_step", stage.from_step, "expected 0: the first stage begins with the run"
        elif number and stage.from_step <= data.mixture[number - 1].from_step:
            last = data.mixture[number - 1].from_step
            yield f"{key}.from_step", stage.from_step, f"expected more than {last}, the step of the stage before"
        weights = stage.weights
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
            yield f"{key}.weights", weights, "expected weights of 0 or more, at least one of them above 0"
        for name in weights:
            source = name.partition("/")[0]
            if data.sources and source not in data.sources:
                known = ", ".join(data.sources)
                yield f"{key}.weights", name, f"expected SOURCE or SOURCE/LABEL with a source of data.sources ({known})"
            elif data.sources and name != source and source in weights:
                yield f"{key}.weights", name, f"{source} is there as well, which contains it; give one of them"
