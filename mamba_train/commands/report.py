"""`mamba-train report RUN [RUN...]`: draw the curves of runs to a PNG and an HTML page."""

import argparse
import dataclasses
import json
from pathlib import Path

from mamba_train.run_folder import BASELINE, CONFIG, read_config, read_json, read_summary, replace, user_path

# Counting the pairs of more training tokens than this would take longer than anyone waits for a report.
MAX_BASELINE_TOKENS = 50_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run (its run_dir)")
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="folder for report.png and report.html (default: the run's own, or ./report for several)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, print where it is and what each run reached.

    Raises ValueError, with one line for the user, for a run that is missing or unreadable.
    """
    from mamba_train.monitor.report import write_report  # --help need not wait for matplotlib

    for run_dir in args.runs:
        problem = ensure_baseline(run_dir) if run_dir.is_dir() else None  # one that is not there is named below
        if problem:
            print(f"no bigram baseline for {run_dir}: {problem}")
    report = write_report(args.runs, args.output)
    for line in report.lines:
        print(line)
    print(f"report: {report.html_path}")
    print(f"curves: {report.png_path}")


def ensure_baseline(run_dir: Path) -> str | None:
    """Score a bigram model on the run's own tokens, once; return why that was not possible, or None.

    It is trained on all of the run's training tokens (the weights of a mixture count for nothing) and
    scored on exactly the targets that the run validates on, so the two figures compare; when these have
    changed it is scored anew.
    """
    if not (run_dir / CONFIG).exists():
        return f"there is no {CONFIG}"
    import numpy as np

    from mamba_train.data.batches import WindowForm
    from mamba_train.data.corpus import Corpus
    from mamba_train.data.manifest import TOKENIZER_NAME
    from mamba_train.data.opening import open_folders
    from mamba_train.data.tokenizer import load_tokenizer
    from mamba_train.data.validation import validation_sets
    from mamba_train.evaluation.bigram import bigram_score

    config = read_config(run_dir / CONFIG, "data.source", "data.sequence_length", "training.validation_sequences")
    summary = read_summary(run_dir)
    if config.data.source == "stream":
        return "the run tokenised its text while it read it: there are no tokens to fit the bigram model to"
    if config.data.get("task"):
        return "a synthetic task is not text"
    if config.data.get("mask_loss_at_documents"):
        return "the run does not predict the first token of a document, the bigram model would"
    folders = {name: Path(folder) for name, folder in (summary.get("sources") or {"": summary["data_folder"]}).items()}
    held_out = {name: Path(folder) for name, folder in summary.get("held_out", {}).items()}
    for folder in (*folders.values(), *held_out.values()):
        if not folder.exists():
            return f"its tokens are not in {folder} any more"
    data = open_folders(folders, held_out)
    corpus = data.everything
    assert isinstance(corpus, Corpus), "folders hold text"
    if corpus.n_tokens > MAX_BASELINE_TOKENS:
        return f"{corpus.n_tokens:,} training tokens are more than {MAX_BASELINE_TOKENS:,}"
    if not data.validation:
        return "nothing is held out to score it on"
    length, n_sequences = config.data.sequence_length, config.training.validation_sequences
    path = run_dir / BASELINE
    fingerprints = [corpus.fingerprint, *(domain.fingerprint for domain in data.validation.values())]
    scored_on = {"data": fingerprints, "sequence_length": length, "validation_sequences": n_sequences}
    if path.exists() and read_json(path).get("scored_on") == scored_on:
        return None
    domains = validation_sets(data.validation, WindowForm(length, with_boundaries=False), n_sequences)
    windows = np.concatenate([batch.tokens.numpy() for domain in domains for batch in domain.batches(1)])
    tokenizer = load_tokenizer(data.folder / TOKENIZER_NAME)
    bytes_per_token = sum(domain.n_bytes(tokenizer) for domain in domains) / (len(windows) * length)
    score = bigram_score(corpus.tokens(), windows, corpus.vocab_size, bytes_per_token)
    content = {"bigram": dataclasses.asdict(score), "scored_on": scored_on}
    try:
        replace(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:  # the run of somebody else, or a full disk
        return f"it cannot be kept there ({error})"
    return None
