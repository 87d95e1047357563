"""The manifest of a prepared folder, put together from the entries of its groups when all are there."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mamba_train.data.documents import SPLITS, Split
from mamba_train.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry
from mamba_train.data.shard_group import read_entry
from mamba_train.data.shard_job import Job
from mamba_train.data.shards import replace_durably


def assemble(folder: Path, job: Job) -> Manifest | None:
    """Write manifest.json if every group is finished, else return None.

    Its bytes depend on the job alone, so it does not matter which process writes it, or how many do.
    """
    manifest = compose(folder, job)
    if manifest is None:
        return None
    data = manifest.to_json().encode("utf-8")
    path = folder / MANIFEST_NAME
    if not path.exists() or path.read_bytes() != data:
        replace_durably(path, data)
    return manifest


def compose(folder: Path, job: Job) -> Manifest | None:
    """The manifest that the entries of the groups make together, None if one of them is not finished."""
    entries = [read_entry(folder, group) for group in job.groups]
    finished = [entry for entry in entries if entry is not None]
    if len(finished) < len(entries):
        return None
    dropped: Counter[str] = Counter()
    shards: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
    for entry in finished:
        for split, listed in entry.shards.items():
            shards[split].extend(listed)
        for read in entry.inputs:
            dropped.update(read["skipped"])
    settings = job.settings
    rule = "each input belongs to the split named with it"
    if settings.validation_fraction:
        rule += f"; about {settings.validation_fraction:.3%} of the training documents held out by a hash"
    return Manifest(
        format_version=FORMAT_VERSION,
        source={"kind": "data_prep", "inputs": [read for entry in finished for read in entry.inputs]},
        settings=asdict(settings),
        split_rule=rule,
        dropped=dict(sorted(dropped.items())),
        tokenizer_sha256=settings.tokenizer_sha256,
        eos_id=settings.eos_id,
        vocab_size=settings.vocab_size,
        shards=shards,
        versions=job.versions,
    )
