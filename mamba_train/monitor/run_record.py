"""What a run left in its folder, read back for a report."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mamba_train.monitor.jsonl import read_metrics
from mamba_train.monitor.redact import redact_credentials
from mamba_train.run_folder import EVALUATION, SAMPLES, read_config, read_json

Series = tuple[list[int], list[float]]


@dataclass(frozen=True)
class RunRecord:
    """One run: its metrics by step and the files beside them, those that exist.

    bigram: the `bigram` entry of baseline.json (bits_per_byte, nats_per_token, n_train_tokens).
    summary: summary.json, of which the report shows `n_parameters`. samples: (step, text) written at checkpoints.
    evaluations: what `mamba-train evaluate` and the hooks of the training found; evaluation_plots: (name, PNG) of it.
    """

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    bigram: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    sample: str | None = None
    samples: list[tuple[int, str]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluation_plots: list[tuple[str, bytes]] = field(default_factory=list)

    def series(self, name: str) -> Series:
        """Steps and values of one metric, where it was recorded and finite."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [float(value) for _, value in points]

    def last(self, name: str) -> float | None:
        """The last recorded value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def lowest(self, name: str) -> tuple[int, float] | None:
        """Step and value where a metric was lowest."""
        steps, values = self.series(name)
        return min(zip(steps, values, strict=True), key=lambda point: point[1]) if values else None

    def median(self, name: str) -> float | None:
        """Median of a metric over the steps."""
        values = self.series(name)[1]
        return statistics.median(values) if values else None

    @property
    def training_seconds(self) -> float:
        """Time spent in steps, without validation and checkpoints."""
        return sum(self.series("step_seconds")[1])

    @property
    def skipped_steps(self) -> list[int]:
        """Steps that passed without an update."""
        return [record["step"] for record in self.metrics if record.get("skipped")]

    @property
    def n_layers_observed(self) -> int:
        """How many layers have SSM health figures."""
        names = {key.split("/")[1] for record in self.metrics for key in record if key.startswith("ssm/layer_")}
        return len(names)

    @property
    def sequence_length(self) -> int | None:
        """Tokens the model saw at once, from the config."""
        return self.config.get("data", {}).get("sequence_length")


def load_run(path: Path) -> RunRecord:
    """Read a run folder; raises ValueError when it is not there, has no metrics, or a file is broken."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run at {path}; expected the folder of a run (its run_dir)")
    sample = path / "sample.txt"
    return RunRecord(
        name=path.resolve().name,
        path=path,
        metrics=read_metrics(path),
        config=_read_config(path / "config.yaml"),
        bigram=_read_json(path / "baseline.json").get("bigram", {}),
        summary=_read_json(path / "summary.json"),
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else None,
        samples=[
            (int(file.stem.split("_")[1]), file.read_text(encoding="utf-8", errors="replace"))
            for file in sorted((path / SAMPLES).glob("step_*.txt"))
        ],
        evaluations=[_read_json(file) for file in sorted((path / EVALUATION).glob("*.json"))],
        evaluation_plots=[(file.stem, file.read_bytes()) for file in sorted((path / EVALUATION).glob("*.png"))],
    )


def load_runs(paths: list[Path]) -> list[RunRecord]:
    """Read several runs; folders of the same name are told apart by the folder above."""
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else RunRecord(**{**vars(run), "name": f"{run.path.resolve().parent.name}/{run.name}"})
        for run in runs
    ]


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_config(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(read_config(path)) if path.is_file() else {}
    assert isinstance(content, dict)
    return redact_credentials({str(key): value for key, value in content.items()})
