"""Training with the CUDA scan beside the same training with the reference scan in plain PyTorch.

    python -m benchmarks.selective_scan_training [--steps 300] [--repeats 4] [--jobs 1] [KEY=VALUE ...]

Runs train.py: mamba_130m on the sources of the standard library, 8 sequences of 512 tokens a step, with each scan as
often as --repeats says. Run k's learning rate is k millionths higher: nothing that matters, but it moves roundings, and
so the runs of one scan show the noise that the difference of the two scans is judged by. With --jobs more than one run
at a time, and speeds that mean nothing. Prints loss and median speed of each run in the folder, the mean of each scan
with its standard deviation, their difference, and how far apart each two runs are; the metrics.jsonl stay there.
--repeats 0 only reports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCANS = ["cuda", "reference"]
LAST, WINDOW = 50, 25
LEARNING_RATE = 6e-4
OPTIONS = [
    "model=mamba_130m",
    "data=stdlib",
    "data.sequence_length=512",
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
    "training.validation_interval_steps=100000",
    "checkpoint.interval_steps=100000",
    "logging.ssm_health_interval_steps=0",
    "logging.progress=plain",
    "logging.wandb=disabled",
]
WITH_REFERENCE = """
import runpy
from kernels.selective_scan.cuda import scan
scan.unsupported = lambda x, states: "the benchmark asks for the reference"
runpy.run_path("train.py", run_name="__main__")
"""


def run(name: str, folder: Path, options: list[str]) -> None:
    scan, number = name.split("-")
    command = [sys.executable] + (["train.py"] if scan == "cuda" else ["-c", WITH_REFERENCE])
    lr = LEARNING_RATE * (1 + 1e-6 * int(number))
    command += [*OPTIONS, f"optim.lr={lr:.12g}", f"run_dir={folder / name}", *options]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def report(folder: Path) -> None:
    """The runs up to the last step that all of them have, so that a benchmark cut short still says something."""
    records = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    }
    n_steps = min(len(run) for run in records.values())
    losses = {name: [record["loss"] for record in run[:n_steps]] for name, run in records.items()}
    print(f"{'run':12s} {f'loss of steps {n_steps - LAST + 1} to {n_steps}':>24s} {'tokens/s':>9s}")
    means: dict[str, list[float]] = {scan: [] for scan in SCANS}
    for name, run in records.items():
        mean = statistics.mean(losses[name][-LAST:])
        means[name.split("-")[0]].append(mean)
        speed = statistics.median(record["tokens_per_second"] for record in run[len(run) // 2 :])
        print(f"{name:12s} {mean:24.5f} {speed:9,.0f}")
    for scan, values in means.items():
        print(f"{scan}: {statistics.mean(values):.5f}, standard deviation {statistics.stdev(values):.5f}")
    first, second = (means[scan] for scan in SCANS)
    error = sum(statistics.variance(values) / len(values) for values in (first, second)) ** 0.5
    print(f"difference: {statistics.mean(first) - statistics.mean(second):+.5f}, standard error {error:.5f}")
    print(f"root mean square, over the run, of differences of means of {WINDOW} losses")
    for a, b in itertools.combinations(losses, 2):
        steps = [x - y for x, y in zip(losses[a], losses[b], strict=True)]
        windows = [statistics.mean(steps[i : i + WINDOW]) for i in range(0, n_steps, WINDOW)]
        print(f"{a}, {b}: {statistics.mean(value**2 for value in windows) ** 0.5:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--scans", nargs="*", default=SCANS, choices=SCANS, help="run only these")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "scan")
    arguments, options = parser.parse_known_args()
    folder, steps = arguments.folder.resolve(), f"training.total_steps={arguments.steps}"
    names = [f"{scan}-{number}" for number in range(arguments.repeats) for scan in arguments.scans]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: run(name, folder, [steps, *options]), names))
    report(folder)


if __name__ == "__main__":
    main()
