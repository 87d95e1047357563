"""What several test folders need: a small real corpus and runs of train.py in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# A model and a run small enough for tests: a step takes a few hundredths of a second.
TINY_RUN = [
    "model.name=mamba_test",
    "model.n_layer=2",
    "model.d_model=32",
    "model.d_state=4",
    "data.vocab_size=300",
    "data.sequence_length=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.validation_interval_steps=10",
    "training.validation_sequences=8",
    "schedule.warmup_steps=5",
    "logging.ssm_health_interval_steps=10",
    "logging.wandb=disabled",
    "logging.progress=plain",
    "checkpoint.interval_steps=5",
    "evaluation.sample_tokens=0",
    "checkpoint.reserve_gib=0",
]


def write_corpus(folder: Path) -> Path:
    """Some modules of the standard library as .txt files: real text, about 200 kB."""
    import argparse
    import ast
    import calendar
    import csv
    import shlex
    import textwrap

    folder.mkdir(parents=True, exist_ok=True)
    for module in (argparse, ast, calendar, csv, shlex, textwrap):
        text = Path(module.__file__).read_text(encoding="utf-8")
        # Several documents, so that boundaries lie inside the windows.
        for number, part in enumerate(text.split("\n\n\n")):
            if part.strip():
                (folder / f"{module.__name__}_{number:03d}.txt").write_text(part, encoding="utf-8")
    return folder


def train_command(run_dir: Path, corpus: Path, *overrides: str) -> list[str]:
    """The command line of a tiny run."""
    return [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "data=local",
        f"data.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}",
        *TINY_RUN,
        f"run_dir={run_dir}",
        *overrides,
    ]


def environment() -> dict[str, str]:
    """One thread: bit-equality needs a fixed number of them, and tests run beside each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def train(run_dir: Path, corpus: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end and return what it printed and its exit code."""
    return subprocess.run(
        train_command(run_dir, corpus, *overrides),
        cwd=corpus.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of metrics.jsonl: of a run that goes on, the last line may be on its way to the disk."""
    *whole, _ = (run_dir / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in whole]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be bit-equal between runs: step, tokens, loss, grad norm, lr (and validation)."""
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "skipped", "validation/loss")
    return [tuple(record.get(key) for key in keys) for record in metrics(run_dir)]
