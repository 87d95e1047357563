"""Streams for tests: text files, a source that reads them, and the definition of their order, written down plainly."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from mamba_train.config_data import DataConfig, DataSource, MixtureStage
from mamba_train.data.batches import WindowForm
from mamba_train.data.stream_loader import StreamLoader
from mamba_train.data.stream_opening import list_stream, open_stream
from mamba_train.data.streams import StreamSource
from mamba_train.data.tokenizer import TextTokenizer, train_tokenizer


def write_files(folder: Path, files: Sequence[Sequence[str]], suffix: str = ".jsonl.zst") -> Path:
    """A file of documents for each list of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(files):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        packed: Callable[[bytes], bytes] = {
            ".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress
        }[suffix]  # fmt: skip
        (folder / f"{number:03d}{suffix}").write_bytes(packed(content))
    return folder


def write_tokenizer(path: Path, texts: Sequence[str]) -> TextTokenizer:
    """A small tokenizer of these texts."""
    tokenizer = train_tokenizer(texts, 400)
    path.write_bytes(tokenizer.serialised)
    return tokenizer


def make_stream(spec: dict[str, Any]) -> StreamSource:
    """What `build_trainer` makes of a config; spec: `data` (of DataConfig), `length`, `global_batch_size`, `seed`."""
    settings = {**spec["data"]}
    settings["mixture"] = [MixtureStage(**stage) for stage in settings.get("mixture", [])]
    data = DataConfig(**{"name": "stream", "source": DataSource.stream, **settings})
    opened = open_stream(data, json.loads(json.dumps(list_stream(data, lambda line: None))))
    form = WindowForm(spec["length"], with_boundaries=True, mask_loss=True)
    batch_size, tokenizer = spec["global_batch_size"], opened.tokenizer.serialised
    return StreamSource(opened.files, tokenizer, data, batch_size, spec["seed"], form, opened.stages)


def steps_of(spec: dict[str, Any], world_size: int = 1, workers: int = 0, micro: int = 1) -> Iterator[list[Any]]:
    """The micro-batches of each step, of all ranks in turn, each rank with a source of its own."""
    loaders = [StreamLoader(make_stream(spec), rank, world_size, micro, workers) for rank in range(world_size)]
    step = 0
    try:
        while True:
            yield [batch for loader in loaders for batch in loader.step(step * spec["global_batch_size"])]
            step += 1
    finally:
        for loader in loaders:
            loader.close()
