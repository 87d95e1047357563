"""Count documents, tokens and bytes per split and domain, and the lengths of the documents.

  python -m data_prep stats pile_shards

Prints a table and draws it: tokens per domain, and how many tokens lie in documents of which length. Reads only the
manifest and the indexes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.progress import Bar
from mamba_train.data.documents import SPLITS, Split
from mamba_train.data.manifest import Manifest, read_manifest
from mamba_train.data.shards import ShardReader

PERCENTILES = (5, 50, 95)
MAX_CURVES = 10  # drawn, of the largest domains
EDGES = 2.0 ** np.arange(32)  # of the histogram: lengths in tokens


@dataclass
class Domain:
    """What the shards of one domain of one split hold."""

    split: Split
    label: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    lengths: np.ndarray  # the different lengths of documents, ascending
    counts: np.ndarray  # how many documents have each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", type=Path, help="what `tokenize` wrote")
    parser.add_argument("--output", type=Path, metavar="PNG", help="the picture (FOLDER/stats.png)")


def run(arguments: argparse.Namespace) -> None:
    """Count, print, draw."""
    folder: Path = arguments.folder.expanduser()
    manifest = read_manifest(folder)
    domains = count(folder, manifest)
    Console(highlight=False, width=None if Console().is_terminal else 120).print(_table(domains))
    output: Path = (arguments.output or folder / "stats.png").expanduser()
    draw(domains, output)
    print(f"drawn in {output}")


def count(folder: Path, manifest: Manifest) -> list[Domain]:
    """All domains, by split, the largest first."""
    found: dict[tuple[Split, str], Domain] = {}
    shards = [(split, shard) for split in SPLITS for shard in manifest.shards[split]]
    with Bar("stats", len(shards)) as bar:
        for number, (split, shard) in enumerate(shards):
            domain = found.setdefault((split, shard.label), Domain(split, shard.label, 0, 0, 0, *_no_lengths()))
            domain.n_documents += shard.n_documents
            domain.n_tokens += shard.n_tokens
            domain.n_bytes += shard.n_bytes
            lengths, counts = np.unique(ShardReader(folder / shard.name).lengths, return_counts=True)
            merged, place = np.unique(np.concatenate([domain.lengths, lengths]), return_inverse=True)
            sums = np.bincount(place, np.concatenate([domain.counts, counts])).astype(np.int64)
            domain.lengths, domain.counts = merged, sums
            bar.update(number + 1)
    return sorted(found.values(), key=lambda domain: (SPLITS.index(domain.split), -domain.n_tokens, domain.label))


def _no_lengths() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def percentile(domain: Domain, percent: float) -> int:
    """The length that `percent` of the documents do not exceed; the longest for 100."""
    ends = np.cumsum(domain.counts)
    return int(domain.lengths[np.searchsorted(ends, percent / 100 * ends[-1])]) if len(ends) else 0


def _table(domains: list[Domain]) -> Table:
    table = Table(box=None)
    for name in ("split", "domain"):
        table.add_column(name)
    for name in ("tokens", "share", "documents", "bytes/token", *(f"p{p}" for p in PERCENTILES), "longest"):
        table.add_column(name, justify="right")
    for domain in domains:
        of_split = sum(other.n_tokens for other in domains if other.split == domain.split)
        table.add_row(
            domain.split,
            domain.label or "-",
            f"{domain.n_tokens:,}",
            f"{domain.n_tokens / max(1, of_split):.2%}",
            f"{domain.n_documents:,}",
            f"{domain.n_bytes / max(1, domain.n_tokens):.2f}",
            *(f"{percentile(domain, p):,}" for p in PERCENTILES),
            f"{percentile(domain, 100):,}",
        )
    return table


def draw(domains: list[Domain], output: Path) -> None:
    """Tokens per domain as bars; of the largest, tokens by the length of their document."""
    # Here, because importing it takes longer than counting.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.5 + 0.3 * len(domains)), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    names = [f"{domain.split} {domain.label}".strip() for domain in domains]
    bars.barh(names, [domain.n_tokens for domain in domains])
    bars.invert_yaxis()
    bars.set_xlabel("tokens")
    for domain, name in zip(domains[:MAX_CURVES], names, strict=False):
        tokens, _ = np.histogram(domain.lengths, EDGES, weights=domain.counts * domain.lengths)
        used = np.flatnonzero(tokens)
        if len(used):
            first, last = used[0], used[-1] + 1
            curves.stairs(tokens[first:last] / tokens.sum(), EDGES[first : last + 1], label=name)
    curves.set_xscale("log", base=2)
    curves.set_xlabel("tokens in the document")
    curves.set_ylabel("share of the tokens")
    curves.legend(fontsize="small")
    figure.savefig(output, dpi=120)
