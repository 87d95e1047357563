"""Prepared folders made by hand: shards with labels and splits as a test wants them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mamba_train.data.documents import SPLITS, Split
from mamba_train.data.manifest import FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME, Manifest, ShardEntry
from mamba_train.data.shards import ShardWriter, token_dtype
from mamba_train.data.tokenizer import TextTokenizer

# A shard: its domain, and documents as token ids without the end of document, which is 0.
Shard = tuple[str, Sequence[Sequence[int]]]


def write_folder(
    folder: Path,
    shards: Mapping[Split, Sequence[Shard]],
    vocab_size: int = 60_000,
    tokenizer: bytes = b"{}",
    bytes_per_token: int = 3,
) -> Path:
    """Write shards, manifest and tokenizer.json."""
    folder.mkdir(parents=True)
    entries: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
    for split, of_split in shards.items():
        for number, (label, documents) in enumerate(of_split):
            with ShardWriter(folder / f"{split}-{number:05d}", token_dtype(vocab_size), 0) as writer:
                for document in documents:
                    writer.add(np.array(document, dtype=np.int64), bytes_per_token * len(document))
                entries[split].append(dataclasses.replace(writer.close(), label=label))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={},
        settings={},
        split_rule="",
        dropped={},
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        eos_id=0,
        vocab_size=vocab_size,
        shards=entries,
        versions={},
    )
    (folder / TOKENIZER_NAME).write_bytes(tokenizer)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


def write_text_folder(
    folder: Path, texts: Mapping[Split, Sequence[tuple[str, Sequence[str]]]], tokenizer: TextTokenizer
) -> Path:
    """As `write_folder`, from text: `tokenizer` has the end of document at 0."""
    assert tokenizer.eos_id == 0
    shards: dict[Split, list[Shard]] = {
        split: [(label, [ids.tolist() for ids in tokenizer.encode_batch(part)]) for label, part in of_split]
        for split, of_split in texts.items()
    }
    return write_folder(folder, shards, tokenizer.vocab_size, tokenizer.serialised)


def numbered(first: int, documents: int, length: int) -> list[list[int]]:
    """Documents in which each token is a different number, from `first` on."""
    return [list(range(first + d * length, first + (d + 1) * length)) for d in range(documents)]
