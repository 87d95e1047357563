"""What several tests of the preparation need."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.__main__ import main
from mamba_train.data.encoders import Encoder, ReferenceEncoder
from mamba_train.data.manifest import Manifest
from mamba_train.data.shard_folder import adopt_folder
from mamba_train.data.shard_group import Surroundings, read_entry, tokenise_group
from mamba_train.data.shard_job import Job, JobSettings, find_inputs, group_inputs
from mamba_train.data.shard_manifest import assemble
from mamba_train.data.shards import ShardReader
from mamba_train.data.text_files import TEXT_SUFFIXES, Fields
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer

Row = tuple[str, str]  # text, label
MakePile = Callable[..., dict[str, list[Row]]]
REPOSITORY = Path(__file__).resolve().parents[2]
VARYING = ("records", ".work")  # who made it and when; locks


def settings(tokenizer: TextTokenizer, **changes: Any) -> JobSettings:
    """Settings for the Pile's form, one small file per group."""
    default: dict[str, Any] = {
        "text_key": "text",
        "label_key": "meta.pile_set_name",
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "group_bytes": 1,
        "shard_bytes": 1 << 30,
        "validation_fraction": 0.0,
        "bad_documents": "error",
        "max_bad_share": 0.01,
    }
    return JobSettings(**{**default, **changes})


def make_shards(
    inputs: list[str],
    folder: Path,
    tokenizer_file: Path,
    log: list[str] | None = None,
    checksums: dict[str, str] | None = None,
    make_encoder: Callable[[TextTokenizer], Encoder] = ReferenceEncoder,
    suffixes: tuple[str, ...] = TEXT_SUFFIXES,
    **changes: Any,
) -> Manifest | None:
    """Do in this process what the command does in several."""
    lines = [] if log is None else log
    tokenizer = load_tokenizer(tokenizer_file)
    found, paths = find_inputs(inputs, "train", suffixes, {}, lines.append)
    chosen = settings(tokenizer, **changes)
    job = Job(1, chosen, {}, group_inputs(found, chosen.group_bytes))
    adopt_folder(folder, job, tokenizer, lines.append)
    fields = Fields(chosen.text_key, chosen.label_key, "--text-key", "--label-key")
    around = Surroundings(folder, chosen, fields, paths, checksums or {}, lines.append, lambda *counts: None)
    for group in job.groups:
        if read_entry(folder, group) is None:
            assert tokenise_group(group, tokenizer, make_encoder(tokenizer), around)
    return assemble(folder, job)


def documents(folder: Path, manifest: Manifest, split: str, label: str | None = None) -> list[str]:
    """Texts of a split (and domain) in the order of the manifest, end-of-document tokens checked and removed."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = []
    for entry in manifest.shards[split]:  # type: ignore[index]
        if label in (None, entry.label):
            shard = ShardReader(folder / entry.name)
            for number in range(len(shard)):
                ids = shard.document(number)
                assert ids[-1] == tokenizer.eos_id
                assert (ids[:-1] != tokenizer.eos_id).all()
                found.append(tokenizer.decode(ids[:-1]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that must not depend on who made it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(VARYING)}


def command(*arguments: object) -> None:
    """Run a command of data_prep in this process (its workers are processes of their own)."""
    argv = sys.argv
    sys.argv = ["data_prep", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = argv


def tokenize_arguments(tmp_path: Path, folder: Path, tokenizer_file: Path, *more: object) -> list[object]:
    return [
        "tokenize", "--preset", "pile", "--tokenizer", tokenizer_file, "--output", folder,
        "--input", f"train={tmp_path}/raw/train/*.zst", f"validation={tmp_path}/raw/val.jsonl.zst", *more,
    ]  # fmt: skip


def start(*arguments: object) -> "subprocess.Popen[str]":
    """Start a command of data_prep as a process."""
    line = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=REPOSITORY, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(folder.name))
    return found


def pile_inputs(tmp_path: Path) -> list[str]:
    """What `pile` made below `tmp_path`, as arguments of --input."""
    return [f"train={tmp_path}/raw/train/*.zst", f"validation={tmp_path}/raw/val.jsonl.zst"]
