"""What a device waits for text that is tokenised while it trains, and what going on in the middle of it costs.

    python -m benchmarks.stream_wait FOLDER [--steps 60] [--more-steps 30] [--mib 160] [--tokenizer FILE]
                                            [--seconds S] [KEY=VALUE ...]

Writes Python sources of this machine (its standard library and what is installed) as `.jsonl.zst` files into FOLDER,
fewer files than lanes, trains a tokenizer on some of them unless one is given, and runs train.py on them: mamba_130m,
32 sequences of 2,048 tokens a step, or what KEY=VALUE says. The run is then gone on with from its checkpoint for
--more-steps. Printed of both: tokens per second (median of the steps after the tenth), and how long a step waited for
its data: the first, and the median and the most of those after it; on the way, the same of every ten steps. A run is
killed after --seconds, and what it has recorded until then is what is printed.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from mamba_train.data.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
VOCAB_SIZE, TOKENIZER_BYTES = 16384, 6_000_000
SETTLED_STEPS = SHOWN_STEPS = 10
OPTIONS = [
    "model=mamba_130m",
    "data=stream",
    "data.workers=2",
    "data.sequence_length=2048",
    "training.global_batch_size=32",
    "training.micro_batch_size=16",
    "logging.ssm_health_interval_steps=0",
    "evaluation.sample_tokens=0",
    "logging.progress=plain",
    "logging.wandb=disabled",
]


def python_sources(n_bytes: int) -> Iterator[str]:
    """Texts of this machine's Python files, until there are so many bytes."""
    paths = sysconfig.get_paths()
    for folder in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for file in sorted(folder.rglob("*.py")):
            if n_bytes <= 0:
                return
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                n_bytes -= len(text)
                yield text


def write_text(folder: Path, n_files: int, n_bytes: int) -> list[str]:
    """Deal the texts to files; returns them."""
    texts = list(python_sources(n_bytes))
    folder.mkdir(parents=True)
    for number in range(n_files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::n_files])
        (folder / f"{number:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    return texts


def train(folder: Path, tokenizer: Path, steps: int, options: list[str], seconds: float) -> None:
    """Run train.py to a step, and print what there is to say about the steps of this start."""
    metrics, log = folder / "run" / "metrics.jsonl", folder / "log.txt"
    n_before = len(read(metrics))
    command = [
        sys.executable, str(REPOSITORY / "train.py"), *OPTIONS, f"data.path={folder / 'text'}",
        f"data.tokenizer={tokenizer}", f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}",
        f"training.total_steps={steps}", f"checkpoint.interval_steps={steps}",
        f"schedule.warmup_steps={min(10, steps)}", *options,
    ]  # fmt: skip
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    n_shown = 0
    while process.poll() is None:
        time.sleep(0.2)
        records = read(metrics)[n_before:]
        while len(records) >= n_shown + SHOWN_STEPS:
            if not n_shown:
                print(f"the first {SHOWN_STEPS} steps were done after {time.perf_counter() - began:.1f} s", flush=True)
            print(describe(records[n_shown : n_shown + SHOWN_STEPS]), flush=True)
            n_shown += SHOWN_STEPS
        if time.perf_counter() - began > seconds:
            process.kill()
            print(f"killed after {seconds:.0f} s", flush=True)
            process.wait()
    records = read(metrics)[n_before:]
    if len(records) < 2 or process.returncode > 0:
        raise SystemExit(f"train.py ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    waits = [record["data_wait_seconds"] * 1e3 for record in records]
    settled = records[min(SETTLED_STEPS, len(records) // 2) :]
    print(
        f"in all: {describe(settled)}; the first step waited {waits[0]:.1f} ms, those after it {max(waits[1:]):.2f} ms "
        f"at most; the whole command {time.perf_counter() - began:.1f} s",
        flush=True,
    )


def read(metrics: Path) -> list[dict[str, Any]]:
    """The records that are complete."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe(records: list[dict[str, Any]]) -> str:
    """Speed and waiting of some steps."""
    waits = [record["data_wait_seconds"] * 1e3 for record in records]
    rates = [record["tokens_per_second"] for record in records]
    seconds = [record["step_seconds"] * 1e3 for record in records]
    return (
        f"steps {records[0]['step']} to {records[-1]['step']}: {statistics.median(rates):,.0f} tokens per second "
        f"({min(rates):,.0f} to {max(rates):,.0f}), a step {statistics.median(seconds):.1f} ms, of which it waited for "
        f"data: median {statistics.median(waits):.2f} ms, at most {max(waits):.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--more-steps", type=int, default=30)
    parser.add_argument("--mib", type=int, default=160)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each run")
    parser.add_argument("options", nargs="*")
    args = parser.parse_intermixed_args()
    folder, tokenizer = args.folder.absolute(), args.tokenizer or args.folder.absolute() / "tokenizer.json"
    texts = write_text(folder / "text", args.files, args.mib << 20)
    if args.tokenizer is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        some = itertools.islice(itertools.cycle(texts), 0, len(texts) * 7, 7)
        tokenizer.write_bytes(train_tokenizer(some, VOCAB_SIZE, TOKENIZER_BYTES).serialised)
    stored = sum(file.stat().st_size for file in (folder / "text").iterdir())
    print(
        f"{sum(map(len, texts)) / 1e6:.0f} million characters in {len(texts):,} documents, {args.files} files of "
        f"{stored / 1e6:.0f} MB together; {os.cpu_count()} processors; {' '.join([*OPTIONS, *args.options])}",
        flush=True,
    )
    train(folder, tokenizer, args.steps, args.options, args.seconds)
    if args.more_steps:
        train(folder, tokenizer, args.steps + args.more_steps, args.options, args.seconds)


if __name__ == "__main__":
    main()
