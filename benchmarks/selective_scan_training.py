"""Training with the CUDA scan beside the same training with the reference scan in plain PyTorch.

    python -m benchmarks.selective_scan_training [--steps 300] [--runs RUN ...] [--folder runs/scan] [KEY=VALUE ...]

Runs train.py: mamba_130m on the sources of the standard library, 8 sequences of 512 tokens a step. A run is cuda-N or
reference-N with N sequences in a micro-batch: N changes the order in which bf16 gradients are added, so the difference
of two runs of the same scan is the noise against which the difference of the two scans is judged. Prints the mean loss
of the last 50 steps and the median speed of the runs in the folder; their metrics.jsonl stay there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = ["cuda-8", "cuda-4", "reference-8", "reference-4"]
LAST = 50
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
    means = {}
    print(f"{'run':12s}  mean loss of the last {LAST} steps  tokens/s")
    for path in sorted(folder.glob("*/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        means[path.parent.name] = statistics.mean(record["loss"] for record in records[-LAST:])
        speed = statistics.median(record["tokens_per_second"] for record in records[len(records) // 2 :])
        print(f"{path.parent.name:12s}  {means[path.parent.name]:31.5f}  {speed:8,.0f}   ({len(records)} steps)")
    for a, b in (("cuda-8", "reference-8"), ("reference-8", "reference-4"), ("cuda-8", "cuda-4")):
        if a in means and b in means:
            print(f"{a} - {b}: {means[a] - means[b]:+.5f}")


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
