"""`mamba-train evaluate RUN`: nats and bits per byte of a model by domain, and at lengths beyond its training."""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_train.run_folder import EVALUATION, SUMMARY, read_summary, replace, user_path

if TYPE_CHECKING:
    from mamba_train.convert.source import Pretrained
    from mamba_train.data.corpus import Corpus
    from mamba_train.data.tokenizer import TextTokenizer
    from mamba_train.evaluation.perplexity import TokenLosses

SPLITS = ("train", "validation", "test")
DEFAULT_SPLIT = "validation"
DEFAULT_PRECISION = "fp32"
DEFAULT_BATCH_SIZE = 8
LONGEST_NAME = 100  # of a list of lengths in a file's name, in characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        metavar="RUN",
        help="folder of a run (its newest checkpoint), of a checkpoint, or of published weights",
    )
    parser.add_argument(
        "--data", action="append", metavar="[NAME=]FOLDER", help="prepared shards (default: those the run validates on)"
    )
    parser.add_argument("--split", default=DEFAULT_SPLIT, choices=SPLITS)
    parser.add_argument(
        "--protocol",
        default="packed",
        choices=["packed", "sliding"],
        help="packed: windows end to end, each begins without context; sliding: they overlap, the last STRIDE count",
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens to predict in a window (default: as in training)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="with --protocol sliding (default: half the length)")
    parser.add_argument(
        "--lengths",
        metavar="N,N,...",
        help="instead: the same text in windows of each length, loss by position, a plot",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first N of each domain")
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help=f"windows at once (default: {DEFAULT_BATCH_SIZE}; with --lengths so many that they have 65,536 tokens)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of matrices (default: bf16 on a GPU, else fp32)")
    parser.add_argument(
        "--output", type=user_path, metavar="DIR", help=f"where {EVALUATION}/ with the results goes (default: the run)"
    )


def run(args: argparse.Namespace) -> None:
    """Print one line for each domain and write the results; raises ValueError, one line, for bad arguments."""
    lengths = _check(args)
    _check_output(args)
    import torch

    from mamba_train.convert.source import load_pretrained
    from mamba_train.data.tokenizer import TextTokenizer
    from mamba_train.evaluation.perplexity import losses_of
    from mamba_train.inference.load import inference_model

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    pretrained = load_pretrained(args.source, print)
    if task := _of_training(pretrained, "task"):
        raise ValueError(
            f"{args.source}: trained on {task}, which has no text; {EVALUATION}/ of the run says how it does"
        )
    if pretrained.tokenizer is None:
        raise ValueError(f"{args.source}: there is no tokenizer.json here, so bytes of text cannot be counted")
    tokenizer = TextTokenizer(pretrained.tokenizer, f"the tokenizer of {args.source}")
    domains = _domains(args, tokenizer)
    dtype = torch.bfloat16 if _precision(args) == "bf16" else torch.float32
    model = inference_model(pretrained.config, pretrained.tensors, torch.device(args.device), dtype)
    if lengths:
        _by_length(args, pretrained, domains, tokenizer, losses_of(model), lengths)
    else:
        _by_domain(args, pretrained, domains, tokenizer, losses_of(model))


def _check(args: argparse.Namespace) -> list[int]:
    for name in ("length", "stride", "max_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.stride is not None and args.protocol != "sliding":
        raise ValueError(f"--stride {args.stride}: only with --protocol sliding")
    if args.lengths is None:
        return []
    try:
        lengths = [int(part) for part in args.lengths.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise ValueError(f"--lengths {args.lengths}: expected whole numbers from 1 on, such as 2048,4096,8192")
    if args.protocol != "packed" or args.length is not None:
        raise ValueError("--lengths takes the place of --protocol and --length")
    return lengths


def _check_output(args: argparse.Namespace) -> None:
    """Raise ValueError where the results, which may take hours, could not be written."""
    if (folder := _output(args)) is None:
        return
    place = (folder / EVALUATION).absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"{existing} is not a folder that can be written to; choose one for the results by --output DIR"
        )


def _output(args: argparse.Namespace) -> Path | None:
    """Where the folder of the results goes; None for weights that no run has made."""
    is_run = (Path(args.source) / SUMMARY).is_file()
    return args.output or (Path(args.source) if is_run else None)


def _precision(args: argparse.Namespace) -> str:
    """Of the matrices; what is not said depends on the device."""
    return args.precision or ("bf16" if args.device == "cuda" else DEFAULT_PRECISION)


def _domains(args: argparse.Namespace, tokenizer: "TextTokenizer") -> "dict[str, Corpus]":
    """The corpora to score, by name."""
    from mamba_train.data.corpus import Corpus
    from mamba_train.data.manifest import MANIFEST_NAME, read_manifest
    from mamba_train.data.prepare import check_prepared

    found: dict[str, Corpus] = {}
    with_text: set[str] = set()
    for name, folder in _folders(args).items():
        if not args.data and not (folder / MANIFEST_NAME).exists():  # moved, removed, or weights that were imported
            raise ValueError(f"{args.source}: its data are not in {folder}; name some by --data FOLDER")
        check_prepared(folder, f"--data {folder}")
        manifest = read_manifest(folder)
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"--data {folder}: made with another tokenizer than the model's (SHA-256 "
                f"{manifest.tokenizer_sha256:.12} and {tokenizer.sha256:.12})"
            )
        with_text |= {split for split, shards in manifest.shards.items() if any(shard.n_tokens for shard in shards)}
        for label in dict.fromkeys(entry.label for entry in manifest.shards[args.split] if entry.n_tokens > 1):
            found["/".join(part for part in (name, label) if part)] = Corpus([(folder, manifest)], args.split, [label])
    if not found:
        there = " and ".join(split for split in SPLITS if split in with_text)
        raise ValueError(f"--split {args.split}: there is no text in it, but in {there or 'no split'}")
    return found


def _folders(args: argparse.Namespace) -> dict[str, Path]:
    if args.data:
        found: dict[str, Path] = {}
        for given in args.data:
            # A folder may have "=" in its name.
            name, _, folder = ("", "", given) if Path(given).expanduser().is_dir() else given.rpartition("=")
            if name in found:
                raise ValueError(f"--data {given}: another folder has the same name, or none; use --data NAME=FOLDER")
            found[name] = Path(folder).expanduser()
        return found
    if not (Path(args.source) / SUMMARY).is_file():
        raise ValueError(f"{args.source} is not the folder of a run, which knows its data; name some by --data FOLDER")
    summary = read_summary(Path(args.source))
    folders = summary.get("held_out") or summary.get("sources") or {"": summary["data_folder"]}
    return {name: Path(folder) for name, folder in folders.items()}


def _of_training(pretrained: "Pretrained", key: str) -> Any:
    """A key of the `data` section of the run's config; None for weights without one."""
    return (pretrained.run_config.get("data") or {}).get(key)


def _by_domain(
    args: argparse.Namespace,
    pretrained: "Pretrained",
    domains: "Mapping[str, Corpus]",
    tokenizer: "TextTokenizer",
    losses: "TokenLosses",
) -> None:
    from mamba_train.evaluation.perplexity import Protocol, Windows, score, total
    from mamba_train.evaluation.results import protocol_of, shown_score

    length = args.length or _of_training(pretrained, "sequence_length")
    if length is None:
        raise ValueError("--length N is needed: these weights do not say at which length they were trained")
    protocol = Protocol(args.protocol)
    windows = Windows(
        protocol,
        length,
        (args.stride or -(-length // 2)) if protocol is Protocol.sliding else None,
        reset_at_documents=bool(_of_training(pretrained, "reset_state_at_documents")),
        max_tokens=args.max_tokens,
        batch_size=args.batch_size or DEFAULT_BATCH_SIZE,
    )
    scores = {}
    for label, corpus in domains.items():
        scores[label] = score(corpus, tokenizer, losses, windows)
        if len(domains) > 1:
            print(_line(label, scores[label]), flush=True)
    print(_line("all" if len(domains) > 1 else next(iter(domains)) or args.split, total(scores)))
    named = protocol_of(windows)
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in named.items() if value is not None))
    _write(
        args,
        pretrained,
        f"perplexity-{protocol}",
        domains,
        {
            **named,
            "domains": {label: shown_score(one) for label, one in scores.items()},
            "all": shown_score(total(scores)),
        },
    )


def _line(label: str, score: Any) -> str:
    return (
        f"{label}: {score.nats_per_token:.4f} nats per token, {score.bits_per_byte:.4f} bits per byte "
        f"({score.n_targets:,} tokens, {score.n_bytes:,} bytes)"
    )


def _by_length(
    args: argparse.Namespace,
    pretrained: "Pretrained",
    domains: "Mapping[str, Corpus]",
    tokenizer: "TextTokenizer",
    losses: "TokenLosses",
    lengths: list[int],
) -> None:
    from mamba_train.evaluation.lengths import length_figure, score_lengths
    from mamba_train.evaluation.results import shown_score
    from mamba_train.monitor.figures import png

    label, corpus = max(domains.items(), key=lambda item: item[1].n_tokens)
    if len(domains) > 1:
        print(f"of {len(domains)} domains the largest, {label}, is taken; name another by --data")
    reset = bool(_of_training(pretrained, "reset_state_at_documents"))
    curve = score_lengths(corpus, tokenizer, losses, lengths, args.max_tokens, reset, args.batch_size)
    for length, one in curve.scores.items():
        print(_line(f"length {length}", one))
    for first, last, nats in curve.by_position():
        print(f"positions {first} to {last}: {nats:.4f} nats per token")
    trained = _of_training(pretrained, "sequence_length")
    content = {
        "trained_length": trained,
        "reset_at_documents": reset,
        "domain": label,
        "lengths": {str(length): shown_score(one) for length, one in curve.scores.items()},
        "by_position": [list(span) for span in curve.by_position()],
    }
    path = _write(args, pretrained, "lengths", domains, content)
    if path is not None:
        picture = path.with_suffix(".png")
        replace(picture, png(length_figure(curve, trained, f"Length extrapolation of {pretrained.config.name}")))
        print(f"plot: {picture}")


def _write(
    args: argparse.Namespace,
    pretrained: "Pretrained",
    kind: str,
    domains: "Mapping[str, Corpus]",
    content: dict[str, Any],
) -> Path | None:
    from mamba_train.evaluation.results import results_path, write_results

    folder = _output(args)
    if folder is None:
        print(json.dumps(content))
        return None
    path = results_path(folder, kind + _asked_for(args, domains), pretrained.step)
    origin = {"source": str(args.source), "data": args.data, "split": args.split, "precision": _precision(args)}
    write_results(path, {"kind": kind, "step": pretrained.step, **origin, **content})
    print(f"results: {path}")
    return path


def _asked_for(args: argparse.Namespace, domains: "Mapping[str, Corpus]") -> str:
    """What of a file's name tells an evaluation from others of the same step, which it must not replace."""
    given = {name: getattr(args, name) for name in ("split", "length", "stride", "max_tokens")}
    given["precision"] = _precision(args)
    usual = (None, DEFAULT_SPLIT, DEFAULT_PRECISION)
    parts = [f"{name}_{value}" for name, value in given.items() if value not in usual]
    if args.lengths is not None:
        # The longest of them decides which tokens are scored: results of two lists are not of the same text.
        parts.insert(0, _short("_".join(map(str, sorted(set(_check(args)))))))
    if args.data:
        fingerprints = "".join(corpus.fingerprint for corpus in domains.values())
        parts.append(f"data_{_hash(fingerprints)}")
    return "".join(f"-{part}" for part in parts)


def _short(name: str) -> str:
    """A name that a file may have."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}_{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
