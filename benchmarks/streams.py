"""Streaming speed: tokens per second of text that is tokenised while it is read, beside a peer on the same files.

    python benchmarks/streams.py FILE.jsonl.zst tokenizer.json [--length 2048] [--rows 8] [--seconds 6] [--repeats 3]

FILE is cut into as many files of equally many documents as there are rows. One core tokenises
(TOKENIZERS_PARALLELISM=false): the bare encoder, which is the library called with texts that are in memory already, as
many characters at once as a lane gives it, and its ids as arrays; decompression and JSON without encoding; ours, from
compressed files to batches with document boundaries, with a file for each row, and with the one FILE for all rows, as
when a corpus has fewer files than lanes; and Hugging Face `datasets` in streaming mode, whose texts the same encoder
turns into the same windows. Printed: median and range in millions of tokens per second of processor time, the rounds of
the sides alternating; and what going on at the end of a compressed file costs, as a resume does. What a step waits for
its data is in stream_wait.py.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import numpy as np
import tokenizers
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mamba_train.config_data import DataConfig, DataSource, EncoderKind
from mamba_train.data.batches import WindowForm, document_numbers
from mamba_train.data.encoders import Encoder, fastokens_call
from mamba_train.data.lanes import Cursor
from mamba_train.data.stream_loader import RankRows, StreamLoader
from mamba_train.data.stream_opening import list_stream, open_stream
from mamba_train.data.streams import ENCODE_CHARACTERS, StreamSource, encoder_of
from mamba_train.data.text_files import Fields, TextRecord, read_texts
from mamba_train.data.tokenizer import load_tokenizer

ENCODED_AT_ONCE = 64  # documents, of the peer
CALLS_PER_LOOK = 8  # at the clock, which may take half a millisecond


def cut(file: Path, folder: Path, n_files: int) -> list[str]:
    """Write the documents of a file into several; returns their texts."""
    with zstandard.open(file, "rb") as stream:
        lines = [line for line in io.BufferedReader(stream) if line.strip()]
    for number in range(n_files):
        packed = zstandard.ZstdCompressor().compress(b"".join(lines[number::n_files]))
        (folder / f"{number:02d}.jsonl.zst").write_bytes(packed)
    return [json.loads(line)["text"] for line in lines]


def bare(texts: list[str], kind: EncoderKind, encode: Callable[[list[str]], list[np.ndarray]]) -> Iterator[int]:
    """Tokens of each call of the library on texts in memory, for ever."""
    while True:
        group: list[str] = []
        for text in texts:
            group.append(text)
            if sum(map(len, group)) >= ENCODE_CHARACTERS[kind]:
                yield sum(len(ids) + 1 for ids in encode(group))
                group = []


def library_call(tokenizer: Path, kind: EncoderKind) -> Callable[[list[str]], list[np.ndarray]]:
    """The encoder of a library as its documentation has it."""
    if kind is EncoderKind.fastokens:
        return fastokens_call(load_tokenizer(tokenizer))
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    return lambda texts: [
        np.array(found.ids, dtype=np.int32) for found in library.encode_batch_fast(texts, add_special_tokens=False)
    ]


def reading(folder: Path, tokens_per_character: float) -> Iterator[float]:
    """Tokens of the texts of the files in turn, which nobody encodes: decompression and JSON alone."""
    while True:
        files = [read_texts(file, Fields("text")) for file in sorted(folder.glob("*.jsonl.zst"))]
        for records in zip(*files, strict=False):
            texts = [record.text for record in records if isinstance(record, TextRecord)]
            yield tokens_per_character * sum(map(len, texts))


def ours(source: StreamSource, rows: int) -> Iterator[int]:
    loader, sample = StreamLoader(source, 0, 1, rows), 0
    try:
        while True:
            yield sum(batch.inputs.numel() for batch in loader.step(sample))
            sample += rows
    finally:
        loader.close()


def theirs(folder: Path, encoder: Encoder, eos_id: int, length: int, rows: int) -> Iterator[int]:
    """Windows of the texts that `datasets` streams, with document boundaries."""
    files = sorted(str(file) for file in folder.glob("*.jsonl.zst"))
    held = np.empty(0, dtype=np.int64)
    need = rows * length + 1
    while True:
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True).select_columns(["text"])
        for batch in stream.iter(batch_size=ENCODED_AT_ONCE):
            found = encoder.encode([TextRecord(0, text, 0) for text in batch["text"]])
            held = np.concatenate([held, *(part for ids in found for part in (ids, [eos_id]))])
            while len(held) >= need:
                windows = np.stack([held[i * length : (i + 1) * length + 1] for i in range(rows)])
                torch.from_numpy(windows), torch.from_numpy(document_numbers(windows, eos_id))
                yield rows * length
                held = held[rows * length :]


def rate(counts: Iterator[float], seconds: float) -> float:
    """Millions of tokens per second of the processor: other work on the machine does not count."""
    n, began = 0.0, time.process_time()
    while time.process_time() - began < seconds:
        n += sum(itertools.islice(counts, CALLS_PER_LOOK))
    return n / (time.process_time() - began) / 1e6


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f}-{max(values):.2f})"


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--resumed", type=Path, help="a larger file to go on in; FILE unless given")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"tokenizers {tokenizers.__version__}, datasets {datasets.__version__}; "
        f"{options.rows} windows of {options.length} in a batch; millions of tokens per second of one core"
    )
    with tempfile.TemporaryDirectory() as name:
        texts = cut(options.file, Path(name), options.rows)
        n_tokens = sum(len(ids) + 1 for ids in library_call(options.tokenizer, EncoderKind.fastokens)(texts))
        titles = ("bare encoder", "reading alone", "ours, file per row", "ours, one file", "datasets, same encoder")
        print(f"{'encoder':12}" + "".join(f"{title:22}" for title in titles))
        for kind in EncoderKind:
            source = make_source(Path(name), options, kind)
            tokenizer = load_tokenizer(options.tokenizer)
            sides = [
                bare(texts, kind, library_call(options.tokenizer, kind)),
                reading(Path(name), n_tokens / sum(map(len, texts))),
                ours(source, options.rows),
                ours(make_source(options.file, options, kind), options.rows),
                theirs(Path(name), encoder_of(tokenizer, kind), tokenizer.eos_id, options.length, options.rows),
            ]
            found: list[list[float]] = [[] for _ in sides]
            for counts in sides:
                next(counts)
            for _ in range(options.repeats):
                for counts, values in zip(sides, found, strict=True):
                    values.append(rate(counts, options.seconds))
            print(f"{kind:12}" + "".join(f"{describe(values):22}" for values in found))
    resume(options.resumed or options.file, options)


def make_source(path: Path, options: argparse.Namespace, kind: EncoderKind) -> StreamSource:
    data = DataConfig(
        name="benchmark", source=DataSource.stream, path=str(path), tokenizer=str(options.tokenizer), encoder=kind,
        cache_dir=tempfile.gettempdir(),
    )  # fmt: skip
    opened = open_stream(data, list_stream(data, lambda line: None))
    form = WindowForm(options.length, with_boundaries=True, mask_loss=True)
    return StreamSource(opened.files, opened.tokenizer.serialised, data, options.rows, 0, form, opened.stages)


def resume(file: Path, options: argparse.Namespace) -> None:
    """How long all lanes of a process need to come to the end of a compressed file that they share."""
    with zstandard.open(file, "rb") as stream:
        chunks = iter(lambda: stream.read(1 << 20), b"")
        n_bytes, n_documents = np.sum([(len(chunk), chunk.count(b"\n")) for chunk in chunks], axis=0).tolist()
    found = []
    for documents in (0, n_documents // options.rows - 2):
        source = make_source(file, options, EncoderKind.tokenizers)
        source.cursors[0, :, Cursor._fields.index("document")] = documents
        rows = RankRows(source, 0, 0, 1, 1)
        found.append(seconds_of(lambda rows=rows: rows[0]))
    print(
        f"first batch of {options.rows} rows from the beginning of a file: {found[0]:.2f} s; from the end of it, "
        f"{n_bytes / 1e6:.0f} MB of text: {found[1]:.2f} s, {n_bytes / 1e6 / (found[1] - found[0]):.0f} MB/s"
    )


if __name__ == "__main__":
    main()
