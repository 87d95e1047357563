"""Options that several commands share: which text, which of its fields, which tokenizer."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_train.data.documents import SPLITS
from mamba_train.data.text_files import FASTA_SUFFIXES, TEXT_SUFFIXES, Fields
from mamba_train.data.tokenizer import TextTokenizer, dna_tokenizer, load_tokenizer

NEOX = "EleutherAI/gpt-neox-20b"
DNA = "dna"  # the tokenizer that has one token per base


@dataclass(frozen=True)
class Preset:
    """What is known about a corpus; an option of the command line counts more."""

    text_key: str = "text"
    label_key: str | None = None
    tokenizer: str | None = None
    suffixes: tuple[str, ...] = TEXT_SUFFIXES


PRESETS = {
    "pile": Preset(label_key="meta.pile_set_name", tokenizer=NEOX),
    "slimpajama": Preset(label_key="meta.redpajama_set_name", tokenizer=NEOX),
    "dna": Preset(tokenizer=DNA, suffixes=FASTA_SUFFIXES),
}


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """--input and what says how to read it."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="[SPLIT=]GLOB",
        help=f"files, folders or globs of {', '.join(TEXT_SUFFIXES)} (with --preset dna: FASTA), or hf:NAME, a dataset "
        "that the library `datasets` can stream; SPLIT= (train, validation, test) says which split they are",
    )  # fmt: skip
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of inputs that name none (train)")
    parser.add_argument("--preset", choices=PRESETS, help="fields and tokenizer of a known corpus")
    parser.add_argument("--text-key", help="field of the text; a dot leads into a nested object (text)")
    parser.add_argument("--label-key", help="field of the domain, such as meta.pile_set_name (none)")
    parser.add_argument("--hub-config", help="configuration of a hub dataset")
    parser.add_argument("--hub-revision", help="commit or tag of a hub dataset")
    parser.add_argument("--hub-split", help="what the hub dataset calls the split")
    parser.add_argument(
        "--bad-documents", choices=("error", "skip"), default="error",
        help="an invalid line, an empty text, a wrong type, bytes that are not UTF-8: stop with file, line and reason, "
        "or leave out and count (error)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-share", type=share, default=0.01, help="with skip: the largest share of a group left out (0.01)"
    )


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `open_hub` asks for."""
    return {"config": arguments.hub_config, "revision": arguments.hub_revision, "split": arguments.hub_split}


def preset_of(arguments: argparse.Namespace) -> Preset:
    """The preset, or one that knows nothing."""
    return PRESETS[arguments.preset] if arguments.preset else Preset()


def fields_of(arguments: argparse.Namespace) -> Fields:
    """Where texts and labels are."""
    preset = preset_of(arguments)
    return Fields(
        arguments.text_key or preset.text_key, arguments.label_key or preset.label_key, "--text-key", "--label-key"
    )


def open_tokenizer(name: str | None, preset: Preset) -> TextTokenizer:
    """A tokenizer from a file, a folder, or the hub. Raises ValueError that begins with --tokenizer."""
    name = name or preset.tokenizer
    if name is None:
        raise ValueError("--tokenizer is not set: expected a tokenizer.json, its folder, or OWNER/NAME of the hub")
    if name == DNA:
        return dna_tokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return load_tokenizer(path, "--tokenizer")
    return load_tokenizer(_download(name), "--tokenizer")


def _download(name: str) -> Path:
    # Here, because only a tokenizer from the hub needs the import.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the library raises many kinds: no such name, no network
        reason = " ".join(str(error).split())
        raise ValueError(f"--tokenizer {name}: no such file, and not to be had from the hub ({reason})") from error


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def mebibytes(text: str) -> int:
    """A number of MiB, as bytes."""
    value = float(text) * (1 << 20)
    if not 1 <= value < 1 << 62:
        raise argparse.ArgumentTypeError(f"expected more than 0 and not that much, got {text}")
    return int(value)


def default_workers() -> int:
    """Cores that SLURM or the system gives this process."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
