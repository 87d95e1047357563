"""`mamba-train report RUN [RUN...]`: draw the curves of runs to a PNG and an HTML page."""

import argparse
import dataclasses
import json
from pathlib import Path

from mamba_train.run_folder import BASELINE, CONFIG, read_summary

# Counting the pairs of more training tokens than this would take longer than anyone waits for a report.
MAX_BASELINE_TOKENS = 50_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (its run_dir)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for report.png and report.html (default: the run's own, or ./report for several)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the report, print where it is and what each run reached.

    Raises ValueError, with one line for the user, for a run that is missing or unreadable.
    """
    from mamba_train.monitor.report import write_report  # --help need not wait for matplotlib

    for run_dir in args.runs:
        problem = ensure_baseline(run_dir)
        if problem:
            print(f"no bigram baseline for {run_dir}: {problem}")
    report = write_report(args.runs, args.output)
    for line in report.lines:
        print(line)
    print(f"report: {report.html_path}")
    print(f"curves: {report.png_path}")


def ensure_baseline(run_dir: Path) -> str | None:
    """Score a bigram model on the run's own tokens, once; return why that was not possible, or None.

    It is trained on the run's training split and scored on exactly the targets that the run validates
    on, so the two figures compare; when these have changed it is scored anew.
    """
    if not (run_dir / CONFIG).exists():
        return f"there is no {CONFIG}"
    from omegaconf import OmegaConf

    from mamba_train.data.batches import Corpus, validation_batches, validation_bytes_per_token
    from mamba_train.evaluation.bigram import bigram_score

    config = OmegaConf.load(run_dir / CONFIG)
    folder = Path(read_summary(run_dir)["data_folder"])
    if not folder.exists():
        return f"its tokens are not in {folder} any more"
    corpus, validation = Corpus.open(folder, "train"), Corpus.open(folder, "validation")
    if corpus.n_tokens > MAX_BASELINE_TOKENS:
        return f"{corpus.n_tokens:,} training tokens are more than {MAX_BASELINE_TOKENS:,}"
    length, n_sequences = config.data.sequence_length, config.training.validation_sequences
    path = run_dir / BASELINE
    scored_on = {"data": corpus.fingerprint, "sequence_length": length, "validation_sequences": n_sequences}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("scored_on") == scored_on:
        return None
    [windows] = validation_batches(validation, length, n_sequences, n_sequences, with_boundaries=False)
    bytes_per_token = validation_bytes_per_token(validation, length, n_sequences)
    score = bigram_score(corpus.tokens(), windows.tokens.numpy(), corpus.vocab_size, bytes_per_token)
    content = {"bigram": dataclasses.asdict(score), "scored_on": scored_on}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return None
