"""Training with the fast operators beside the same training with the reference operators in plain PyTorch.

    python -m benchmarks.operator_training [--model mamba_130m] [--steps 300] [--repeats 4] [--jobs 1] [--plot FILE.png]
                                           [KEY=VALUE ...]

Runs train.py: the model on the sources of the standard library, 8 sequences of 512 tokens a step, with either kind of
operators (scan or SSD, convolution, norms, loss) as often as --repeats says. Run k's learning rate is k millionths
higher: nothing that matters, but it moves roundings, and so the runs of one kind show the noise that the difference of
the two is judged by. With --jobs more than one run at a time, and speeds that mean nothing. Prints loss and median
speed of each run in the folder, the mean of each kind with its standard deviation, their difference, and how far apart
each two runs are; the metrics.jsonl stay there. --repeats 0 only reports.
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
KINDS = ["fast", "reference"]
LAST, WINDOW = 50, 25
LEARNING_RATE = 6e-4
OPTIONS = [
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
from kernels import dispatch
from kernels.selective_scan.cuda import scan
reason = "the benchmark asks for the reference"
scan.unsupported = lambda x, states: reason
dispatch._device_unsupported = lambda index: reason
runpy.run_path("train.py", run_name="__main__")
"""


def run(name: str, folder: Path, options: list[str]) -> None:
    kind, number = name.split("-")
    command = [sys.executable] + (["train.py"] if kind == "fast" else ["-c", WITH_REFERENCE])
    lr = LEARNING_RATE * (1 + 1e-6 * int(number))
    command += [*OPTIONS, f"optim.lr={lr:.12g}", f"run_dir={folder / name}", *options]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def report(folder: Path, plot: Path | None) -> None:
    """The runs up to the last step that all of them have, so that a benchmark cut short still says something."""
    records = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    }
    n_steps = min(len(run) for run in records.values())
    losses = {name: [record["loss"] for record in run[:n_steps]] for name, run in records.items()}
    print(f"{'run':12s} {f'loss of steps {n_steps - LAST + 1} to {n_steps}':>24s} {'tokens/s':>9s}")
    means: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name, run in records.items():
        mean = statistics.mean(losses[name][-LAST:])
        means[name.split("-")[0]].append(mean)
        speed = statistics.median(record["tokens_per_second"] for record in run[len(run) // 2 :])
        print(f"{name:12s} {mean:24.5f} {speed:9,.0f}")
    for kind, values in means.items():
        print(f"{kind}: {statistics.mean(values):.5f}, standard deviation {statistics.stdev(values):.5f}")
    first, second = (means[kind] for kind in KINDS)
    error = sum(statistics.variance(values) / len(values) for values in (first, second)) ** 0.5
    print(f"difference: {statistics.mean(first) - statistics.mean(second):+.5f}, standard error {error:.5f}")
    print(f"root mean square, over the run, of differences of means of {WINDOW} losses")
    for a, b in itertools.combinations(losses, 2):
        steps = [x - y for x, y in zip(losses[a], losses[b], strict=True)]
        windows = [statistics.mean(steps[i : i + WINDOW]) for i in range(0, n_steps, WINDOW)]
        print(f"{a}, {b}: {statistics.mean(value**2 for value in windows) ** 0.5:.5f}")
    if plot is not None:
        draw(losses, plot)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """The curves over each other, and below the difference of each from the mean of the reference runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(2, 1))
    references = [values for name, values in losses.items() if name.startswith("reference")]
    middle = [statistics.mean(values) for values in zip(*references, strict=True)]
    for name, values in losses.items():
        style = {"color": "tab:blue" if name.startswith("fast") else "tab:orange", "alpha": 0.7, "linewidth": 0.9}
        above.plot(values, label=name, **style)
        differences = [value - other for value, other in zip(values, middle, strict=True)]
        smooth = [statistics.mean(differences[max(0, i - WINDOW) : i + 1]) for i in range(len(values))]
        below.plot(smooth, **style)
    above.set_ylabel("loss, nats per token")
    above.legend()
    below.set_ylabel(f"minus the reference's\n(means of {WINDOW} steps)")
    below.set_xlabel("step")
    below.set_ylim(-0.03, 0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mamba_130m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="run only these")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "operators")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    arguments, options = parser.parse_known_args()
    folder = arguments.folder.resolve()
    chosen = [f"model={arguments.model}", f"training.total_steps={arguments.steps}"]
    names = [f"{kind}-{number}" for number in range(arguments.repeats) for kind in arguments.kinds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: run(name, folder, [*chosen, *options]), names))
    report(folder, arguments.plot)


if __name__ == "__main__":
    main()
