"""What evaluations found, in a run's folder: one JSON file for each kind and step, which the report shows."""

import json
from pathlib import Path
from typing import Any

from mamba_train.evaluation.perplexity import Score, Windows
from mamba_train.run_folder import EVALUATION, replace


def results_path(folder: Path, kind: str, step: int | None) -> Path:
    """Where a result belongs: `evaluation/KIND-step_00000500.json`; a later one of the same kind takes its place."""
    name = kind if step is None else f"{kind}-step_{step:08d}"
    return folder / EVALUATION / f"{name}.json"


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write a result; a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def protocol_of(windows: Windows) -> dict[str, Any]:
    """Everything that another figure must share to be compared with this one."""
    return {
        "protocol": windows.protocol.value,
        "length": windows.length,
        "stride": windows.stride,
        "reset_at_documents": windows.reset_at_documents,
        "max_tokens": windows.max_tokens,
    }


def shown_score(score: Score) -> dict[str, Any]:
    """A score as JSON values."""
    return {
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
        "n_targets": score.n_targets,
        "n_bytes": score.n_bytes,
    }


def task_scores(results: dict[str, Any]) -> dict[str, float]:
    """`TASK/METRIC` and its value, of what the harness returned; standard errors are left out."""
    return {
        f"{task}/{metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric and metric != "sample_len"
    }
