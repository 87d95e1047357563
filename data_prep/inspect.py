"""Show documents of prepared shards as text, for a person to read: drawn at random, the same for the same seed.

python -m data_prep inspect pile_shards --label ArXiv --documents 5
"""

import argparse
import random
from pathlib import Path

import numpy as np

from data_prep.options import positive
from mamba_train.data.documents import SPLITS
from mamba_train.data.manifest import TOKENIZER_NAME, read_manifest
from mamba_train.data.shards import ShardReader
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", type=Path, help="what `tokenize` wrote")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(train)")
    parser.add_argument("--label", help="only this domain")
    parser.add_argument("--documents", type=positive, default=3, help="how many (3)")
    parser.add_argument("--tokens", type=positive, default=150, help="shown of the beginning and the end of each (150)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other documents (0)")


def run(arguments: argparse.Namespace) -> None:
    """Draw documents, each with the same chance, and print them."""
    folder: Path = arguments.folder.expanduser()
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME, str(folder / TOKENIZER_NAME))
    all_shards = manifest.shards[arguments.split]
    shards = [shard for shard in all_shards if arguments.label in (None, shard.label) and shard.n_documents]
    if not shards:
        labels = ", ".join(sorted({shard.label or '""' for shard in all_shards})) or "nothing"
        asked = f"--split {arguments.split}" + ("" if arguments.label is None else f" --label {arguments.label}")
        raise ValueError(f"{asked}: no documents; the split has {labels}")
    ends = np.cumsum([shard.n_documents for shard in shards])
    generator = random.Random(arguments.seed)
    n_shown = min(arguments.documents, int(ends[-1]))
    for place in sorted(generator.sample(range(int(ends[-1])), n_shown)):
        shard = shards[int(np.searchsorted(ends, place, side="right"))]
        number = place - int(ends[shards.index(shard)]) + shard.n_documents
        ids = ShardReader(folder / shard.name).document(number)
        print(f"=== {shard.name}, document {number}, {shard.label or 'no label'}, {len(ids):,} tokens")
        print(_excerpt(ids, tokenizer, arguments.tokens))


def _excerpt(ids: np.ndarray, tokenizer: TextTokenizer, limit: int) -> str:
    if len(ids) <= 2 * limit:
        return tokenizer.decode(ids)
    left_out = f"\n--- {len(ids) - 2 * limit:,} tokens ---\n"
    return tokenizer.decode(ids[:limit]) + left_out + tokenizer.decode(ids[-limit:])
