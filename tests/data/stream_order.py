"""The order of a stream by its definition, without lanes that remember anything."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba_train.data.lanes import LaneOrder
from mamba_train.data.mixture import Mixture, Stage
from mamba_train.data.position import state_of
from mamba_train.data.streams import StreamSource
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from tests.data.streams import write_files

BATCH = 12
LENGTH = 32


Files = list[list[str]]


def spec_of(folder: Path, tokenizer: Path, **data: Any) -> dict[str, Any]:
    settings = {"tokenizer": str(tokenizer), "cache_dir": str(folder.parent / "cache"), **data}
    if "sources" not in settings:
        settings["path"] = str(folder)
    return {"data": settings, "length": LENGTH, "global_batch_size": BATCH, "seed": 5}


def documents_of(files: Files, order: LaneOrder, lane: int, repeat: bool) -> Iterator[str]:
    """The texts of a lane, by the definition of its order."""
    for epoch in itertools.count() if repeat else [0]:
        for piece in order.pieces(lane, epoch):
            mine = dict(enumerate(files[piece.file][piece.residue :: piece.stride]))
            for block in range(-(-len(mine) // order.block)):
                yield from (mine[i] for i in order.documents(piece, epoch, block) if mine.get(i, "").strip())


def windows_of(
    files: Files, order: LaneOrder, lane: int, repeat: bool, tokenizer: TextTokenizer
) -> Iterator[list[int]]:
    tokens: list[int] = []
    for text in documents_of(files, order, lane, repeat):
        tokens += [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        while len(tokens) > LENGTH:
            yield tokens[: LENGTH + 1]
            tokens = tokens[LENGTH:]
    if len(tokens) > 1:
        yield tokens


def expected_steps(spec: dict[str, Any], sources: dict[str, Files]) -> Iterator[list[list[int]]]:
    """The rows of each global batch by the definition; an empty row where a lane has ended."""
    data, tokenizer = spec["data"], load_tokenizer(spec["data"]["tokenizer"])
    n_lanes, repeat = data.get("lanes") or BATCH, data.get("repeat", True)
    stages = data.get("mixture") or [{"from_step": 0, "weights": {"": 1.0}}]
    mixture = Mixture([Stage(s["from_step"], s["from_step"] * BATCH, s["weights"]) for s in stages], spec["seed"])
    lanes = {
        (name, lane): windows_of(
            files,
            LaneOrder(
                spec["seed"], name, len(files), n_lanes, data.get("shuffle_files", False),
                data.get("shuffle_documents") or 1,
            ),
            lane, repeat, tokenizer,
        )
        for name, files in sources.items() for lane in range(n_lanes)
    }  # fmt: skip
    for step in itertools.count():
        samples = np.arange(step * BATCH, (step + 1) * BATCH)
        numbers, _ = mixture.locate(samples)
        yield [
            next(lanes[mixture.names[number], sample % n_lanes], [])
            for number, sample in zip(numbers.tolist(), samples.tolist(), strict=True)
        ]


def rows_of(batches: list[Any]) -> list[list[int]]:
    """The tokens of each row, without padding."""
    found = []
    for batch in batches:
        lengths = [LENGTH + 1] * len(batch.tokens) if batch.lengths is None else batch.lengths.tolist()
        found += [row[:n] for row, n in zip(batch.tokens.tolist(), lengths, strict=True)]
    return found


def mixed(texts: list[str], folder: Path, tokenizer: Path) -> tuple[dict[str, Any], dict[str, Files]]:
    """Three sources, one of them rare, in two stages; more lanes than rows."""
    sources = {
        "a": [texts[i::7][:40] for i in range(7)],
        "b": [texts[100:180], texts[180:300]],
        "c": [texts[300:500]],
    }
    places = {name: str(write_files(folder / name, files, f)) for (name, files), f in zip(
        sources.items(), (".jsonl.zst", ".jsonl.gz", ".jsonl"), strict=True)}  # fmt: skip
    stages = [
        {"from_step": 0, "weights": {"a": 0.7, "b": 0.299, "c": 0.001}},
        {"from_step": 23, "weights": {"b": 1.0, "c": 2.0}},
    ]
    spec = spec_of(
        folder / "text", tokenizer, sources=places, mixture=stages, lanes=2 * BATCH, shuffle_files=True,
        shuffle_documents=16,
    )  # fmt: skip
    return spec, sources


def keep(tables: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    tables.append(table)
    return table


def gathered(sources: list[StreamSource], samples: int) -> dict[str, Any]:
    """The state that the ranks have together."""
    tables: list[torch.Tensor] = []
    for rank, source in enumerate(sources):
        source.gather(rank, len(sources), functools.partial(keep, tables))
    sources[0].cursors = sum(tables).numpy()
    return state_of(sources[0], samples)
