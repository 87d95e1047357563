"""Tokens per second of `data_prep tokenize`, beside the encoder alone and beside `datasets.map` with transformers.

  python benchmarks/tokenise.py --input minipile.jsonl.zst --tokenizer 20B_tokenizer.json --workers 2

Every contender reads the same .jsonl.zst files (the input, repeated up to --mib of text, one file per worker and
group) in a fresh process per repeat, the contenders taking turns; those with fastokens get eight times as much, lest
the start of a process be all that is measured. "Alone" has its texts in memory and its tokenizer loaded when the clock
starts, encodes and converts to uint16, and writes nothing; the others are timed from the start of their process to its
end. CPU seconds are what the machine's other work disturbs least. Text that is repeated flatters an encoder that keeps
words it has seen. Without --input the text is the standard library of this Python and the tokenizer one trained on it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

FAST_FACTOR = 8
REPOSITORY = Path(__file__).resolve().parents[1]
CONTENDERS = {
    "tokenizers alone": "the reference",
    "data_prep, tokenizers": "tokenizers alone",
    "datasets.map, transformers": "tokenizers alone",
    "fastokens alone": "tokenizers alone",
    "data_prep, fastokens": "fastokens alone",
}


def write_input(folder: Path, source: Path | None, n_files: int, n_bytes: int) -> list[Path]:
    """Files of JSON lines with about `n_bytes` of text in all."""
    if source is None:
        library = Path(os.__file__).parent
        rows = [{"text": file.read_text(encoding="utf-8", errors="replace")} for file in sorted(library.glob("*.py"))]
    else:
        with zstandard.open(source, "rt", encoding="utf-8") as stream:
            rows = [{"text": json.loads(line)["text"]} for line in stream]
    rows = [row for row in rows if row["text"].strip()]
    paths = [folder / f"{number:03d}.jsonl.zst" for number in range(n_files)]
    place = 0
    for path in paths:
        written = 0
        with zstandard.open(path, "wt", encoding="utf-8") as stream:
            while written < n_bytes // n_files:
                row = rows[place % len(rows)]
                stream.write(json.dumps(row) + "\n")
                written += len(row["text"].encode())
                place += 1
    return paths


def texts_of(path: Path) -> list[str]:
    """All texts of a file."""
    with zstandard.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def encode_alone(path: Path, tokenizer_file: Path, fast: bool, start: Any, results: Any) -> None:
    """One process of "encoder alone": (seconds of CPU, tokens)."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    texts = texts_of(path)
    if fast:
        from fastokens import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.encode_special_tokens = True
    start.wait()
    began, n_tokens = time.process_time(), 0
    for first in range(0, len(texts), 64):
        batch = texts[first : first + 64]
        if fast:
            data, _ = tokenizer.encode_batch_flat(batch, split_special_tokens=True)
            n_tokens += len(np.frombuffer(data, "<u4").astype(np.uint16))
        else:
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                n_tokens += len(np.array(encoding.ids, dtype=np.uint16))
    results.put((time.process_time() - began, n_tokens))


def run_alone(paths: list[Path], tokenizer_file: Path, workers: int, fast: bool) -> dict[str, float]:
    """As many processes as workers, a file each at a time; the clock starts when all have loaded."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(paths) + 1), context.Queue()
    assert len(paths) == workers
    processes = [
        context.Process(target=encode_alone, args=(path, tokenizer_file, fast, start, results)) for path in paths
    ]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    found = [results.get() for _ in processes]
    wall = time.perf_counter() - began
    for process in processes:
        process.join()
    return {"wall": wall, "cpu": sum(cpu for cpu, _ in found), "tokens": sum(tokens for _, tokens in found)}


def run_process(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds of a command with all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE)  # fmt: skip
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


MAP = """
import sys
import datasets
from transformers import PreTrainedTokenizerFast
tokenizer_file, workers, cache, *files = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
def encode(batch):
    return {"input_ids": [ids + [0] for ids in tokenizer(batch["text"])["input_ids"]]}
rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
rows.map(encode, batched=True, num_proc=int(workers), remove_columns=rows.column_names)
"""


def run(name: str, paths: list[Path], tokenizer_file: Path, workers: int) -> dict[str, float]:
    """One repeat of one contender."""
    if name.endswith("alone"):
        return run_alone(paths, tokenizer_file, workers, fast=name.startswith("fastokens"))
    with tempfile.TemporaryDirectory() as scratch:
        if name.startswith("data_prep"):
            command = [
                sys.executable, "-m", "data_prep", "tokenize", "--input", str(paths[0].parent), "--tokenizer",
                str(tokenizer_file), "--output", f"{scratch}/out", "--workers", str(workers), "--group-mib", "0.001",
                "--encoder", name.split(", ")[1],
            ]  # fmt: skip
            return run_process(command, {})
        command = [sys.executable, "-c", MAP, str(tokenizer_file), str(workers), scratch, *map(str, paths)]
        return run_process(command, {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a .jsonl.zst with texts")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mib", type=int, default=100, help="MiB of text")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = _inputs(Path(scratch) / "input", arguments, 1)
        tokenizer_file = arguments.tokenizer
        if tokenizer_file is None:
            from mamba_train.data.tokenizer import train_tokenizer

            tokenizer_file = Path(scratch) / "tokenizer.json"
            tokenizer_file.write_bytes(train_tokenizer(texts_of(paths[0]), 8192).serialised)
        n_bytes = sum(len(text.encode()) for path in paths for text in texts_of(path))
        names = [name for name in CONTENDERS if "fastokens" not in name or _has_fastokens()]
        fast_paths = _inputs(Path(scratch) / "fast", arguments, FAST_FACTOR) if _has_fastokens() else []
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for repeat in range(arguments.repeats):
            for name in names:
                chosen = fast_paths if "fastokens" in name else paths
                found[name].append(run(name, chosen, tokenizer_file.absolute(), arguments.workers))
                print(f"repeat {repeat + 1}: {name}: {found[name][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
    report(found, n_bytes, arguments.workers, arguments.repeats)


def _inputs(folder: Path, arguments: argparse.Namespace, factor: int) -> list[Path]:
    folder.mkdir()
    return write_input(folder, arguments.input, arguments.workers, factor * arguments.mib << 20)


def _has_fastokens() -> bool:
    try:
        version("fastokens")
    except ImportError:
        return False
    return True


def report(found: dict[str, list[dict[str, float]]], n_bytes: int, workers: int, repeats: int) -> None:
    """A table in Markdown: medians, with the lowest and highest."""
    n_tokens = found["tokenizers alone"][0]["tokens"]
    names = ("tokenizers", "transformers", "datasets", "fastokens", "zstandard")
    versions = ", ".join(f"{name} {version(name)}" for name in names if name != "fastokens" or _has_fastokens())
    print(f"{n_bytes / 1e6:.0f} MB of text, {n_tokens / 1e6:.1f}M tokens, {workers} processes, {repeats} repeats")
    print(f"{_cpu()}, Python {platform.python_version()}, {versions}\n")
    print("| | Mtok/s | Mtok per CPU second | CPU seconds per token |\n|---|---|---|---|")
    cpu_seconds: dict[str, float] = {}  # per token
    for name, runs in found.items():
        n_tokens = found["fastokens alone" if "fastokens" in name else "tokenizers alone"][0]["tokens"]
        speeds = {kind: sorted(n_tokens / 1e6 / one[kind] for one in runs) for kind in ("wall", "cpu")}
        cells = [f"{statistics.median(s):.2f} ({s[0]:.2f} to {s[-1]:.2f})" for s in speeds.values()]
        cpu_seconds[name] = statistics.median(one["cpu"] for one in runs) / n_tokens
        other = CONTENDERS[name]
        ratio = f"{cpu_seconds[name] / cpu_seconds[other]:.2f} × {other}" if other in found else other
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio} |")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} logical cores"


if __name__ == "__main__":
    main()
