"""The files of a run folder that are neither checkpoints nor metrics."""

import json
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"  # the composed config
TOKENIZER = "tokenizer.json"  # a copy of the one the data was made with
SUMMARY = "summary.json"  # what the commands need to know: see `write_summary`
BASELINE = "baseline.json"  # the bigram model on the same tokens
SAMPLE = "sample.txt"  # text that the model wrote


def write_summary(run_dir: Path, *, n_parameters: int, data_folder: Path) -> None:
    """Record the size of the model and where the prepared data lies."""
    summary = {"n_parameters": n_parameters, "data_folder": str(data_folder.resolve())}
    (run_dir / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `write_summary` wrote; raises ValueError when `run_dir` is not the folder of a run."""
    path = run_dir / SUMMARY
    if not path.is_file():
        raise ValueError(f"{run_dir}: not the folder of a run (there is no {SUMMARY}); give a run_dir of train.py")
    return json.loads(path.read_text(encoding="utf-8"))
