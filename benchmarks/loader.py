"""Loading speed: tokens per second of one process, beside Hugging Face `datasets`, on the same tokens.

    python benchmarks/loader.py [--tokens 20000000] [--length 2048] [--rows 8] [--batches 400] [--repeats 5]

Both give shuffled windows as int64 tensors with the number of each token's document, by the plain DataLoader of
PyTorch: ours from token shards, in a mixture of four domains; `datasets` from an Arrow file of the same windows in the
order of `shuffle`, with the document numbers computed where its batches are collated. Token values are drawn at random,
document lengths log-normal: neither looks at what the tokens are. The files are in the page cache. Printed: median and
range in millions of tokens per second, by number of worker processes; the rounds of the two alternate, and begin after
the workers have started. Last, what a training step of 20 ms waits for its data.
"""

import argparse
import dataclasses
import hashlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mamba_train.data.batches import BatchSource, WindowForm, document_numbers
from mamba_train.data.documents import SPLITS
from mamba_train.data.loader import BatchLoader
from mamba_train.data.manifest import FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME, Manifest
from mamba_train.data.opening import OpenedData, open_folders
from mamba_train.data.shards import ShardWriter

VOCAB_SIZE, EOS_ID = 50_277, 0
LABELS = ("web", "books", "code", "talk")
STEP_SECONDS = 0.02
WARM_UP_BATCHES = 10


def make_shards(folder: Path, n_tokens: int) -> OpenedData:
    """A prepared folder of eight shards of four domains."""
    generator = np.random.default_rng(0)
    entries = []
    for number in range(2 * len(LABELS)):
        with ShardWriter(folder / f"train-{number:05d}", np.dtype(np.uint16), EOS_ID) as writer:
            while writer.size_bytes < 2 * n_tokens // (2 * len(LABELS)):
                ids = generator.integers(1, VOCAB_SIZE, size=int(generator.lognormal(6.2, 1.2)) + 1)
                writer.add(ids, 4 * len(ids))
            entries.append(dataclasses.replace(writer.close(), label=LABELS[number % len(LABELS)]))
    (folder / TOKENIZER_NAME).write_bytes(b"{}")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={},
        settings={},
        split_rule="",
        dropped={},
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        eos_id=EOS_ID,
        vocab_size=VOCAB_SIZE,
        shards={split: entries if split == "train" else [] for split in SPLITS},
        versions={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return open_folders({"": folder}, {}, [(0, {"web": 0.6, "books": 0.25, "code": 0.149, "talk": 0.001})])


def make_dataset(folder: Path, data: OpenedData, length: int) -> Any:
    """The same tokens as an Arrow file of windows, opened again from the disk."""
    tokens = data.everything.tokens()
    n = (len(tokens) - 1) // length
    windows = [tokens[i * length : (i + 1) * length + 1].astype(np.uint16) for i in range(n)]
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
    datasets.Dataset.from_dict({"tokens": windows}, features=features).save_to_disk(str(folder / "arrow"))
    return datasets.load_from_disk(str(folder / "arrow")).shuffle(seed=0).with_format("torch")


def collate(rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.stack([row["tokens"] for row in rows]).to(torch.int64)
    return tokens, torch.from_numpy(document_numbers(tokens.numpy(), EOS_ID))


def ours(source: BatchSource, rows: int, workers: int) -> tuple[Callable[[], object], Callable[[], None]]:
    """A function that gives the next batch, and one that ends it."""
    loader = BatchLoader(source, 0, 1, rows, workers=workers)
    position = iter(range(0, 2**62, rows))
    return lambda: loader.step(next(position)), loader.close


def theirs(dataset: Any, rows: int, workers: int) -> tuple[Callable[[], object], Callable[[], None]]:
    options = {"prefetch_factor": 4} if workers else {}

    def forever() -> Iterator[object]:
        while True:
            yield from DataLoader(dataset, rows, num_workers=workers, collate_fn=collate, drop_last=True, **options)

    batches = forever()
    return lambda: next(batches), batches.close


def rate(next_batch: Callable[[], object], n_batches: int, tokens_per_batch: int) -> float:
    """Millions of tokens per second."""
    began = time.perf_counter()
    for _ in range(n_batches):
        next_batch()
    return n_batches * tokens_per_batch / (time.perf_counter() - began) / 1e6


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):7.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        data = make_shards(Path(name), options.tokens)
        dataset = make_dataset(Path(name), data, options.length)
        form = WindowForm(options.length, with_boundaries=True, mask_loss=True)
        source = BatchSource(data.corpora, options.rows, 0, form, data.stages)
        print(
            f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, datasets {datasets.__version__}; {data.everything.n_tokens:,} tokens, "
            f"{options.rows} windows of {options.length} in a batch"
        )
        print("workers   ours, Mtok/s            datasets, Mtok/s")
        tokens_per_batch = options.rows * options.length
        for workers in (0, 1, 2):
            compare(source, dataset, options, workers, tokens_per_batch)
        for workers in (0, 1, 2):
            print(
                f"wait of a step of {STEP_SECONDS * 1e3:.0f} ms, {workers} workers: {waits(source, options, workers)}"
            )


def compare(source: BatchSource, dataset: Any, options: argparse.Namespace, workers: int, tokens: int) -> None:
    sides = ours(source, options.rows, workers), theirs(dataset, options.rows, workers)
    # Theirs is slower by orders of magnitude: fewer batches take as long.
    n_batches = options.batches, max(1, options.batches // 10)
    found: tuple[list[float], list[float]] = ([], [])
    for next_batch, _ in sides:
        rate(next_batch, WARM_UP_BATCHES, tokens)
    for _ in range(options.repeats):
        for (next_batch, _), n, values in zip(sides, n_batches, found, strict=True):
            values.append(rate(next_batch, n, tokens))
    for _, close in sides:
        close()
    print(f"{workers:7}   {describe(found[0]):22}  {describe(found[1])}")


def waits(source: BatchSource, options: argparse.Namespace, workers: int) -> str:
    """Milliseconds that steps wait after the first one."""
    loader = BatchLoader(source, 0, 1, options.rows, workers=workers)
    found = []
    for step in range(100):
        loader.step(step * options.rows)
        found.append(loader.wait_seconds * 1e3)
        time.sleep(STEP_SECONDS)
    loader.close()
    return f"first {found[0]:.1f} ms, then {statistics.median(found[1:]):.2f} ms (at most {max(found[1:]):.2f})"


if __name__ == "__main__":
    main()
