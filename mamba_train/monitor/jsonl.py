"""`metrics.jsonl`: every metric of every step, one JSON object a line, each step once.

A line is handed to the operating system in one write before `log` returns, so a process killed at
any instant loses at most the line that it was writing. On resume the lines after the checkpoint's
step, which the run is about to write again, are moved aside rather than deleted.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Metrics = Mapping[str, float | int | bool | None]

METRICS_NAME = "metrics.jsonl"


class JsonlSink:
    """Appends metrics to `run_dir/metrics.jsonl`.

    A write that fails (a full disk) is reported once through `warn`, counted in `dropped`, and
    leaves no half-written line; training goes on and later records are tried again.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None] = print) -> None:
        self.path = Path(run_dir) / METRICS_NAME
        self.dropped = 0
        self.n_kept = 0  # records that `cut_at` left
        self._warn = warn
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")  # a torn line must not swallow the first record of this run
        return descriptor

    def log(self, metrics: Metrics) -> None:
        """Append one record; floats keep every digit, NaN and infinities become null."""
        line = json.dumps(finite(metrics), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, line)
        except OSError as error:
            self.dropped += 1
            os.ftruncate(self._descriptor, end)
            if self.dropped == 1:
                self._warn(f"metrics: cannot write {self.path}: {error}; training goes on without this record")

    def cut_at(self, step: int) -> Path | None:
        """Keep the records up to and including `step`; move the others to `metrics.cut-NNN.jsonl`.

        A torn or unreadable line is moved too. Both files appear by rename, the cut one first, so
        that a kill in between leaves lines in both files but never in none. Returns the file the
        lines went to, or None when there was nothing to move.
        """
        kept, cut = self.path.with_suffix(".kept.tmp"), self.path.with_suffix(".cut.tmp")
        try:
            n_cut = self._part(step, kept, cut)
        except OSError:
            for path in (kept, cut):  # on a full disk they are what is too much
                path.unlink(missing_ok=True)
            raise
        if n_cut == 0:
            kept.unlink()
            cut.unlink()
            return None
        target = next(path for path in _cut_names(self.path) if not path.exists())
        os.replace(cut, target)
        os.replace(kept, self.path)
        os.close(self._descriptor)
        self._descriptor = self._open()
        return target

    def _part(self, step: int, kept: Path, cut: Path) -> int:
        self.n_kept = n_cut = 0
        with open(self.path, "rb") as source, open(kept, "wb") as kept_file, open(cut, "wb") as cut_file:
            for line in source:
                record = _parse(line)
                if record is not None and record["step"] <= step:
                    kept_file.write(line)
                    self.n_kept += 1
                else:
                    n_cut += 1
                    cut_file.write(line if line.endswith(b"\n") else line + b"\n")
            for file in (kept_file, cut_file):
                file.flush()
                os.fsync(file.fileno())
        return n_cut

    def close(self) -> None:
        """Close the file; `log` must not be called afterwards."""
        os.close(self._descriptor)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the records of a run in the order they were written.

    A torn last line (the run was killed, or is writing just now) is left out. Raises ValueError
    when there is no metrics.jsonl, no record in it, or another line that is no JSON object with a
    step.
    """
    path = Path(run_dir) / METRICS_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {METRICS_NAME}; expected the folder of a run (its run_dir)")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path} line {number} is not a JSON object with a step; remove that line")
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no complete record yet; wait for the run's first step")
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record else None


def finite(metrics: Metrics) -> dict[str, float | int | bool | None]:
    """A copy with None for NaN and infinities, which JSON does not have."""
    return {key: _finite_or_none(value) for key, value in metrics.items()}


def _finite_or_none(value: float | int | bool | None) -> float | int | bool | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_all(descriptor: int, line: bytes) -> None:
    # One write almost always takes the whole line; a nearly full disk may take only its beginning.
    while line:
        line = line[os.write(descriptor, line) :]


def _cut_names(path: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield path.with_name(f"metrics.cut-{number:03d}.jsonl")
        number += 1
