"""Read every byte of prepared shards and say what is wrong; exit code 1 if anything is.

  python -m data_prep verify pile_shards

Finds a changed byte, a truncated or missing shard, an id outside the vocabulary, doubled or missing
end-of-document ids, a wrong index, and a manifest that belongs to another tokenizer or is not what the
entries of the groups say. It changes nothing.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from data_prep.options import default_workers, positive
from data_prep.progress import Bar
from mamba_train.data.documents import SPLITS
from mamba_train.data.manifest import Manifest, ShardEntry, read_manifest
from mamba_train.data.verification import folder_problems, plan_problems, shard_problems

EXIT_DAMAGED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", type=Path, help="what `tokenize` wrote")
    parser.add_argument("--workers", type=positive, help="processes (the cores that SLURM or the system gives)")


def run(arguments: argparse.Namespace) -> None:
    """Check the manifest, then all shards in parallel."""
    folder: Path = arguments.folder.expanduser()
    manifest = read_manifest(folder)
    problems = [*folder_problems(folder, manifest), *plan_problems(folder, manifest)]
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    n_bytes = sum(shard.bin_size + shard.idx_size for shard in shards)
    n_workers = min(arguments.workers or default_workers(), max(1, len(shards)))
    done = 0
    with (
        Bar("verify", n_bytes) as bar,
        ProcessPoolExecutor(n_workers, get_context("spawn"), _keep, (folder, manifest)) as pool,
    ):
        checks = {pool.submit(_check, shard): shard for shard in shards}
        for check in as_completed(checks):
            problems += check.result()
            done += checks[check].bin_size + checks[check].idx_size
            bar.update(done, f"{done / 1e6 / bar.seconds:,.0f} MB/s")
    for problem in sorted(problems):
        print(problem)
    if problems:
        print(
            f"{len(problems)} problems. To make a damaged shard again, delete its .bin file and give the `tokenize` "
            "command once more"
        )
        raise SystemExit(EXIT_DAMAGED)
    n_tokens = sum(shard.n_tokens for shard in shards)
    print(f"{folder}: {len(shards):,} shards, {n_tokens:,} tokens, {n_bytes:,} bytes: nothing is wrong")


_kept: list[tuple[Path, Manifest]] = []  # of this worker process: sent once, not with every shard


def _keep(folder: Path, manifest: Manifest) -> None:
    _kept[:] = [(folder, manifest)]


def _check(shard: ShardEntry) -> list[str]:
    folder, manifest = _kept[0]
    return list(shard_problems(folder, manifest, shard))
