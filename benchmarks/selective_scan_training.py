"""Training with the CUDA scan beside the same training with the reference scan in plain PyTorch.

    python -m benchmarks.selective_scan_training [--steps 300] [--runs RUN ...] [--folder runs/scan] [KEY=VALUE ...]

Runs train.py: mamba_130m on the sources of the standard library, 8 sequences of 512 tokens a step. A run is cuda-N or
reference-N with N sequences in a micro-batch: N changes the order in which bf16 gradients are added, so the difference
of two runs of the same scan is the noise against which the difference of the two scans is judged. Prints the losses
and the median speed of the runs in the folder, and how far apart each two are; their metrics.jsonl stay there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = ["cuda-8", "cuda-4", "reference-8", "reference-4"]
LAST, WINDOW = 50, 25
OPTIONS = [
    "model=mamba_130m",
    "data=stdlib",
    "data.sequence_length=512",
    "training.global_batch_size=8",
    "training.validation_interval_steps=100000",
    "checkpoint.interval_steps=100000",
    "logging.ssm_health_interval_steps=0",
    "logging.progress=plain",
    "logging.wandb=disabled",
    "optim.lr=6e-4",
]
WITH_REFERENCE = """
import runpy
from kernels.selective_scan.cuda import scan
scan.unsupported = lambda x, states: "the benchmark asks for the reference"
runpy.run_path("train.py", run_name="__main__")
"""


def run(name: str, folder: Path, options: list[str]) -> None:
    scan, sequences = name.split("-")
    command = [sys.executable] + (["train.py"] if scan == "cuda" else ["-c", WITH_REFERENCE])
    command += [*OPTIONS, f"training.micro_batch_size={sequences}", f"run_dir={folder / name}", *options]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def report(folder: Path) -> None:
    losses = {}
    print(f"{'run':12s} {'steps':>6s} {f'loss of the last {LAST}':>20s} {'validation loss':>16s} {'tokens/s':>9s}")
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        losses[path.parent.name] = values = [record["loss"] for record in records]
        speed = statistics.median(record["tokens_per_second"] for record in records[len(records) // 2 :])
        print(
            f"{path.parent.name:12s} {len(values):6d} {statistics.mean(values[-LAST:]):20.5f}"
            f" {records[-1]['validation/loss']:16.5f} {speed:9,.0f}"
        )
    print(f"differences: of the last {LAST} losses; root mean square of those of {WINDOW} losses each")
    for a, b in itertools.combinations(losses, 2):
        steps = [x - y for x, y in zip(losses[a], losses[b], strict=True)]
        windows = [statistics.mean(steps[i : i + WINDOW]) for i in range(0, len(steps), WINDOW)]
        scale = statistics.mean(value**2 for value in windows) ** 0.5
        print(f"{a} - {b}: {statistics.mean(steps[-LAST:]):+.5f}; {scale:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "scan")
    arguments, options = parser.parse_known_args()
    for name in arguments.runs:
        run(name, arguments.folder.resolve(), [f"training.total_steps={arguments.steps}", *options])
    report(arguments.folder)


if __name__ == "__main__":
    main()
