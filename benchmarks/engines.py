"""One config under several engines: curves, tokens per second, peak memory, the hold-up of a save.

    python benchmarks/engines.py --processes 2 --steps 200 --out docs/engines.png model=mamba_370m ...

Starts train.py by torchrun once for each engine, in folders under --runs, and prints a table from their metrics.jsonl:
the median rate and its quartiles without the first tenth of the steps, the peak memory that torch allocated on rank 0,
and how long saves held up the training: the first, which also allocates the buffers on the host, and the longest of
the others. The curves go to --out. Each line is printed when its run ends; the last is the first engine once more with
Adam's eps a hundred thousandth larger, which moves roundings and nothing else: how far its curve is from the first is
the noise that the other differences are judged by.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "hsdp": ["engine=fsdp", "engine.replicas=2"],
    "zero-1": ["engine=deepspeed", "engine.zero_stage=1"],
    "zero-2": ["engine=deepspeed", "engine.zero_stage=2"],
    "zero-3": ["engine=deepspeed", "engine.zero_stage=3"],
}
LAST = 50
SAVES = 4  # of each run; that of the last step holds up nothing


def run(engine: str, args: argparse.Namespace, name: str, *more: str) -> list[dict]:
    """Train with one engine in the folder `name`, print its line, and return the records of its steps."""
    run_dir = args.runs / name
    shutil.rmtree(run_dir, ignore_errors=True)
    # Not --standalone: its workers look for the name of this host, which need not resolve to an address.
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.processes}"]
    command += ["--master-addr=localhost", f"--master-port={free_port()}"]
    command += [str(REPOSITORY / "train.py"), *ENGINES[engine], f"training.total_steps={args.steps}"]
    command += [f"checkpoint.interval_steps={max(1, args.steps // SAVES)}", "checkpoint.keep_last=1"]
    command += ["logging.wandb=disabled", f"run_dir={run_dir}", *args.overrides, *more]
    log = args.runs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name}: exit code {code}; see {log}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    print(row(name, records), flush=True)
    return records


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def row(engine: str, records: list[dict]) -> str:
    """One line of the table."""
    tokens_per_step = records[0]["tokens"] // records[0]["step"]
    # Of each step by itself: the record's tokens_per_second is a mean over the last steps, which hides the spread.
    steady = [tokens_per_step / record["step_seconds"] for record in records[len(records) // 10 :]]
    low, median, high = statistics.quantiles(steady, n=4)
    held_up = [record["checkpoint/hold_up_seconds"] for record in records if "checkpoint/hold_up_seconds" in record]
    first, later = (f"{held_up[0]:.3f}", f"{max(held_up[1:]):.3f}") if len(held_up) > 1 else ("-", "-")
    memory = max(record["memory_gib"] for record in records)
    last = statistics.fmean(record["loss"] for record in records[-LAST:])
    return f"| {engine} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {memory:.2f} | {first}, {later} | {last:.4f} |"


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    """The losses over each other, and how far each is from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[2, 1])
    first = [record["loss"] for record in next(iter(curves.values()))]
    for engine, records in curves.items():
        steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
        above.plot(steps, losses, label=engine, linewidth=1)
        below.plot(steps, [a - b for a, b in zip(losses, first, strict=True)], linewidth=1)
    above.set_ylabel("loss (nats per token)")
    above.legend()
    below.set_ylabel(f"loss minus that of {next(iter(curves))}")
    below.set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["fsdp", "zero-2", "zero-3"], choices=list(ENGINES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs/engines"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/engines/engines.png"), help="where the curves go")
    args, args.overrides = parser.parse_known_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{args.processes} x {device}, torch {torch.__version__}, {args.steps} steps of {' '.join(args.overrides)}\n"
    )
    held_up = "hold-up of the first save, of the longest later one (s)"
    print(f"| engine | tokens/s (quartiles) | peak memory (GiB) | {held_up} | mean of last {LAST} losses |")
    print("|---|---|---|---|---|")
    curves = {engine: run(engine, args, engine) for engine in args.engines}
    first = args.engines[0]
    curves[f"{first} again"] = run(first, args, f"{first}-again", "optim.eps=1.00001e-8")
    draw(curves, args.out)
    print(f"\ncurves: {args.out}")


if __name__ == "__main__":
    main()
