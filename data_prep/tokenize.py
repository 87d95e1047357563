"""Turn text into Megatron shards (.bin, .idx) with a manifest: one shard per group of input files and domain.

  python -m data_prep tokenize --preset pile --input 'train=PILE/train/*.jsonl.zst' 'validation=PILE/val.jsonl.zst' \\
      --tokenizer 20B_tokenizer.json --output pile_shards

The bytes depend on the inputs and the settings alone, not on the number of workers or tasks. A command that was
killed goes on where it stopped when it is given again. In a SLURM array each task takes its share of the groups;
whichever finishes last writes manifest.json.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.options import (
    add_input_options,
    default_workers,
    fields_of,
    hub_options,
    mebibytes,
    open_tokenizer,
    positive,
    preset_of,
    share,
)
from data_prep.progress import Bar
from mamba_train.data.documents import SPLITS
from mamba_train.data.encoders import fastokens_call
from mamba_train.data.manifest import MANIFEST_NAME, Manifest
from mamba_train.data.shard_folder import adopt_folder, read_job
from mamba_train.data.shard_group import GROUPS_FOLDER, read_entry
from mamba_train.data.shard_job import Group, Job, JobSettings, find_inputs, group_inputs, plan
from mamba_train.data.shard_manifest import assemble
from mamba_train.data.shard_pool import Work, run_pool
from mamba_train.data.tokenizer import TextTokenizer

RECORDS_FOLDER = "records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_input_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, its folder, or OWNER/NAME of the hub")
    parser.add_argument(
        "--encoder", choices=("tokenizers", "fastokens"), default="tokenizers",
        help="fastokens: an optional faster package; every group of files is checked against the reference, which "
        "takes over where an id differs (tokenizers)",
    )  # fmt: skip
    parser.add_argument("--workers", type=positive, help="processes (the cores that SLURM or the system gives)")
    parser.add_argument("--tasks", type=positive, help="commands that share the work (SLURM_ARRAY_TASK_COUNT or 1)")
    parser.add_argument("--task-index", type=int, help="which of them this is, from 0 (SLURM_ARRAY_TASK_ID or 0)")
    parser.add_argument(
        "--group-mib",
        type=mebibytes,
        default="1024",
        help="stored MiB of input files that one worker takes at once (1024)",
    )
    parser.add_argument("--shard-mib", type=mebibytes, default="1024", help="a shard is closed at this size (1024)")
    parser.add_argument(
        "--validation-fraction", type=share, default=0.0, help="share of the training documents held out by a hash (0)"
    )
    parser.add_argument(
        "--checksums", type=Path, metavar="FILE", help="lines of SHA-256 and file name, as sha256sum writes them"
    )


def run(arguments: argparse.Namespace) -> None:
    """Plan, make this task's groups, and write the manifest if nothing is missing."""
    n_tasks, task = _task(arguments)
    preset = preset_of(arguments)
    inputs, paths = find_inputs(arguments.input, arguments.split, preset.suffixes, hub_options(arguments), print)
    tokenizer = open_tokenizer(arguments.tokenizer, preset)
    if arguments.encoder == "fastokens":
        fastokens_call(tokenizer)  # says at once if that cannot work
    job = _plan(arguments, tokenizer, group_inputs(inputs, arguments.group_mib))
    checksums = _checksums(arguments.checksums and arguments.checksums.expanduser(), paths)
    folder: Path = arguments.output.expanduser()
    adopt_folder(folder, job, tokenizer, print)
    mine = [group for group in job.groups if group.number % n_tasks == task]
    todo = [group for group in mine if read_entry(folder, group) is None]
    print(
        f"{len(inputs):,} inputs in {len(job.groups):,} groups; task {task + 1} of {n_tasks} has {len(mine):,}, "
        f"{len(todo):,} of them still to do",
        flush=True,
    )
    if todo:
        n_workers = min(arguments.workers or default_workers(), len(todo))
        threads = max(1, (arguments.workers or default_workers()) // n_workers)
        work = Work(
            folder, job.settings, fields_of(arguments), paths, checksums, tokenizer.serialised, arguments.encoder,
            sorted(todo, key=lambda group: -group.size), threads,
        )  # fmt: skip
        _make(work, n_workers, arguments)
    # Another task may have been begun again meanwhile, with more that may be left out.
    manifest = assemble(folder, read_job(folder))
    if manifest is None:
        n_done = sum(read_entry(folder, group) is not None for group in job.groups)
        print(f"{n_done:,} of {len(job.groups):,} groups are finished; {MANIFEST_NAME} comes with the last of them")
    else:
        _describe(folder, manifest)


def _task(arguments: argparse.Namespace) -> tuple[int, int]:
    """(number of tasks, this one's index from 0), from the options or from SLURM's array."""
    environment = os.environ
    n_tasks, task = arguments.tasks, arguments.task_index
    if n_tasks is None and task is None and "SLURM_ARRAY_TASK_ID" in environment:
        if environment.get("SLURM_ARRAY_TASK_STEP", "1") != "1":
            raise ValueError("--tasks: the SLURM array has a step; give --tasks and --task-index")
        if "SLURM_ARRAY_TASK_COUNT" not in environment:  # older SLURMs do not say it
            raise ValueError("--tasks: SLURM does not say how many tasks the array has; give --tasks and --task-index")
        n_tasks = int(environment["SLURM_ARRAY_TASK_COUNT"])
        # An array may begin at any number.
        task = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    if (n_tasks is None) != (task is None):
        raise ValueError("--tasks and --task-index go together")
    n_tasks, task = n_tasks or 1, task or 0
    if not 0 <= task < n_tasks:
        raise ValueError(f"--task-index {task}: expected 0 to {n_tasks - 1}, as --tasks is {n_tasks}")
    return n_tasks, task


def _plan(arguments: argparse.Namespace, tokenizer: TextTokenizer, groups: tuple[Group, ...]) -> Job:
    fields = fields_of(arguments)
    settings = JobSettings(
        text_key=fields.text_key,
        label_key=fields.label_key,
        tokenizer_sha256=tokenizer.sha256,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        group_bytes=arguments.group_mib,
        shard_bytes=arguments.shard_mib,
        validation_fraction=arguments.validation_fraction,
        bad_documents=arguments.bad_documents,
        max_bad_share=arguments.max_bad_share,
    )
    return plan(settings, groups)


def _checksums(file: Path | None, paths: dict[str, Path]) -> dict[str, str]:
    """Expected SHA-256 of each input (`paths` by name), from the lines of a file as `sha256sum` writes them.

    A line is for the input whose path ends with the line's, the longest such line if there are several; where none
    is, for the input that the line's path ends with. Raises ValueError that begins with --checksums.
    """
    if file is None:
        return {}
    whole: dict[str, set[str]] = {}  # digests by the path of their line
    endings: dict[str, set[str]] = {}  # and by each of its endings
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None:
            raise ValueError(f"--checksums {file}:{number}: expected a SHA-256, two spaces and a file name")
        digest, listed = match.group(1).lower(), match.group(2).removeprefix("./")
        whole.setdefault(listed, set()).add(digest)
        for ending in _endings(listed):
            endings.setdefault(ending, set()).add(digest)
    expected, missing = {}, []
    for name, path in sorted(paths.items()):
        digests = next((whole[ending] for ending in _endings(str(path)) if ending in whole), endings.get(name, set()))
        if len(digests) > 1:
            raise ValueError(f"--checksums {file}: {len(digests)} lines could be for {path} and differ")
        expected[name] = next(iter(digests), "")
        if not digests:
            missing.append(name)
    if missing:
        raise ValueError(f"--checksums {file}: has no line for {missing[0]} ({len(missing)} of {len(paths)} inputs)")
    return expected


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--checksums {file}: cannot be read ({error})") from error


def _endings(path: str) -> Iterator[str]:
    """The path itself, then what is left of it without its first folder, without its first two, ..."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def _make(work: Work, n_workers: int, arguments: argparse.Namespace) -> None:
    record = _Record(work.folder, arguments, n_workers)
    with Bar("tokenize", sum(group.size for group in work.groups)) as bar:
        last = [0, 0, 0]

        def show(counts: list[int]) -> None:
            last[:] = counts
            n_bytes, n_documents, n_tokens = counts
            bar.update(n_bytes, f"{n_documents:,} documents, {n_tokens:,} tokens, {n_tokens / bar.seconds:,.0f} per s")

        busy = run_pool(work, n_workers, bar.message, show)
        _, n_documents, n_tokens = last
        record.finish(n_documents, n_tokens, bar.seconds)
    if busy:
        print(f"another process is making {len(busy)} of the groups ({busy[0]} ...): not waiting for it")
    print(f"tokenised {n_documents:,} documents, {n_tokens:,} tokens in {bar.seconds:.1f} s, {n_workers} workers")


class _Record:
    """Who made shards here, where and when: beside the manifest, because it does not determine them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, n_workers: int) -> None:
        began = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        host = socket.gethostname()
        self._path = folder / RECORDS_FOLDER / f"{began}-{host}-{os.getpid()}.json"
        self._content: dict[str, Any] = {
            "command": sys.argv, "host": host, "began": began, "workers": n_workers, "encoder": arguments.encoder,
            "python": platform.python_version(),
        }  # fmt: skip
        self._path.parent.mkdir(exist_ok=True)
        self._write()

    def finish(self, n_documents: int, n_tokens: int, seconds: float) -> None:
        self._content.update(documents=n_documents, tokens=n_tokens, seconds=round(seconds, 1))
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def _describe(folder: Path, manifest: Manifest) -> None:
    for split in SPLITS:
        if manifest.shards[split]:
            labels = {shard.label for shard in manifest.shards[split]}
            print(
                f"{split}: {manifest.total(split, 'n_documents'):,} documents, {manifest.total(split, 'n_tokens'):,} "
                f"tokens, {len(manifest.shards[split]):,} shards, {len(labels)} domains"
            )
    for kind, count in manifest.dropped.items():
        print(f"left out: {count:,} documents, {kind} (lines in {folder / GROUPS_FOLDER})")
    digest = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    print(f"complete: {folder / MANIFEST_NAME}, SHA-256 {digest:.12}, fingerprint {manifest.fingerprint:.12}")
