"""How long a run takes from its first step to its full speed: with empty caches, and again with full ones.

    python benchmarks/first_step.py [--steps 30] [model=mamba_130m ...]

Runs train.py twice with `engine.kernel_cache` in a new folder, where NVRTC, Triton and the inductor keep what they
compile, and reads metrics.jsonl. A step is at full speed when it takes at most a tenth longer than the median of the
second half. Printed: the seconds of the first steps, their sum until full speed, what of it is more than so many steps
at full speed would take, and the wall time of the process, from its start to its end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SHOWN = 5
TOLERANCE = 1.1


def run(folder: Path, name: str, steps: int, overrides: list[str]) -> None:
    command = [sys.executable, str(TRAIN), f"run_dir={folder / name}", f"engine.kernel_cache={folder / 'cache'}"]
    command += [f"data.cache_dir={folder / 'data'}", f"training.total_steps={steps}", "logging.wandb=disabled"]
    command += ["logging.ssm_health_interval_steps=0", f"training.validation_interval_steps={steps}"]
    command += [f"checkpoint.interval_steps={steps}", "evaluation.sample_tokens=0", "schedule.warmup_steps=1"]
    command += overrides
    begin = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wall = time.perf_counter() - begin
    if result.returncode:
        raise SystemExit(f"{name}: exit code {result.returncode}\n{result.stdout[-2000:]}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines]
    steady = statistics.median(seconds[len(seconds) // 2 :])
    slow = next(number for number, value in enumerate(seconds) if value <= TOLERANCE * steady)
    first = ", ".join(f"{value:.2f}" for value in seconds[:SHOWN])
    begun = sum(seconds[:slow])
    lost = begun - slow * steady
    print(
        f"{name}: {begun:.1f} s to full speed ({slow} steps; {lost:.1f} s more than these take later); "
        f"first steps {first} s, later {steady:.3f} s; the whole process {wall:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty caches", "full caches"):
            run(Path(folder), name.replace(" ", "-"), args.steps, overrides)


if __name__ == "__main__":
    main()
