"""`python -m slurm.status [RUN ...] [--follow]`: where runs on the cluster are, and why they were started anew.

RUN is the folder of a run or of a sweep; without one, all runs below `runs/`. Reads files and asks squeue.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from mamba_train import run_folder
from mamba_train.composition import user_errors_exit
from mamba_train.monitor.heartbeat import read_heartbeats
from mamba_train.monitor.jsonl import METRICS_NAME
from mamba_train.monitor.progress import format_duration

HISTORY = "history.jsonl"
JOB = "job.json"  # in the folder of a submission
DEFAULT_FOLDER = Path("runs")
TAIL_BYTES = 2**16
SHOWN_STARTS = 5
FOLLOW_SECONDS = 5.0
SILENT_SECONDS, SILENT_INTERVALS = 60.0, 3  # without a sign of life, whichever is longer


@dataclass(frozen=True)
class Status:
    """What is known about one run. Times are seconds since 1970.

    job: the last one's id. queue: what squeue says of it, in words. events: what the batch script recorded.
    metrics: the last record; recorded_at: when. saved: (step, when) of the newest complete checkpoint. heartbeats: what
    each rank last said, by rank.
    """

    run_dir: Path
    job: str | None
    queue: str
    events: list[dict[str, Any]]
    metrics: dict[str, Any]
    recorded_at: float | None
    total_steps: int | None
    saved: tuple[int, float] | None
    log: Path | None
    heartbeats: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Of the last job."""
        return [event for event in self.events if event["event"] == "start" and event["job"] == self.job]


def main() -> None:
    """Parse the command line and show the runs; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument(
        "runs", nargs="*", type=run_folder.user_path, metavar="RUN", help="folder of a run or of a sweep"
    )
    parser.add_argument("--follow", action="store_true", help=f"show it again every {FOLLOW_SECONDS:g} seconds")
    parser.add_argument("--lines", type=int, default=10, help="how many lines of the log (default: 10)")
    args = parser.parse_intermixed_args()
    # Ctrl-C is how one leaves --follow.
    with user_errors_exit(), contextlib.suppress(KeyboardInterrupt):
        while True:
            text = show(args.runs, args.lines)
            if not args.follow:
                print(text)
                return
            # Clear the terminal, or part the pages where there is none.
            print("\033[2J\033[H" if sys.stdout.isatty() else "-" * 80, text, sep="\n", flush=True)
            time.sleep(FOLLOW_SECONDS)


def show(paths: list[Path], n_lines: int) -> str:
    """One run in full, several in a line each; raises ValueError for a folder that holds none."""
    run_dirs = [run_dir for path in paths or [DEFAULT_FOLDER] for run_dir in find_runs(path)]
    now = time.time()
    if len(run_dirs) == 1:
        return "\n".join(in_full(read_status(run_dirs[0]), now, n_lines))
    return "\n".join(in_a_line(read_status(run_dir)) for run_dir in run_dirs)


def find_runs(path: Path) -> list[Path]:
    """The runs in a folder that were submitted to SLURM, started or not; the folder itself may be one."""
    if (path / run_folder.SLURM / HISTORY).is_file():
        return [path]
    found = {file.parents[1] for file in path.glob(f"**/{run_folder.SLURM}/{HISTORY}")}
    for file in path.glob(f"**/{run_folder.SLURM}/submission-*/{JOB}"):
        root = file.parents[2]
        found |= {root / name for name in _read_job(file)[1]}
    if not found:
        raise ValueError(f"{path}: no run there that was submitted by slurm.submit or slurm/train.sbatch")
    return sorted(found)


def read_status(run_dir: Path) -> Status:
    """Read what a run left in its folder, and ask SLURM about its job."""
    events = _read_lines(run_dir / run_folder.SLURM / HISTORY, "job")
    job = _waiting_job(run_dir, after=events[-1]["time"] + 1 if events else 0.0)
    if job is None and events:
        job = events[-1]["job"]
    metrics_file = run_dir / METRICS_NAME
    records = _read_lines(metrics_file, "step")
    log = Path(events[-1]["log"]) if events else None
    return Status(
        run_dir=run_dir,
        job=job,
        queue=_ask_queue(job) if job else "no job",
        events=events,
        metrics=records[-1] if records else {},
        recorded_at=metrics_file.stat().st_mtime if records else None,
        total_steps=_total_steps(run_dir),
        saved=_newest_checkpoint(run_dir),
        log=log if log is not None and log.is_file() else None,
        heartbeats=read_heartbeats(run_dir),
    )


def in_full(status: Status, now: float, n_lines: int) -> list[str]:
    """The page of one run."""
    lines = [f"run     {status.run_dir}", f"job     {status.job}: {status.queue}"]
    if status.events and status.events[-1]["event"] not in ("start", "requeue"):
        last = status.events[-1]
        lines.append(f"last    {last['event']}, {_ago(last['time'], now)}{_colon(last['reason'])}")
    starts = status.starts
    lines.append(f"starts  {len(starts)}" + (f", the last {SHOWN_STARTS}:" if len(starts) > SHOWN_STARTS else ""))
    for start in starts[-SHOWN_STARTS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
        lines.append(f"        {when} after step {start['step']:,} on {start['nodes']}{_colon(start['reason'])}")
    lines += [f"{name:<7} {text}" for name, text in _figures(status, now)]
    if status.log is not None:
        lines += [f"log     {status.log}", *(f"  | {line}" for line in _last(n_lines, _tail(status.log)))]
    return lines


def in_a_line(status: Status) -> str:
    """The run among others."""
    figures = dict(_figures(status, time.time()))
    parts = [str(status.run_dir), f"job {status.job}: {status.queue}", f"{len(status.starts)} starts"]
    return "  ".join([*parts, figures.get("step", "no step yet"), figures.get("loss", "")]).rstrip()


def _figures(status: Status, now: float) -> list[tuple[str, str]]:
    metrics, found = status.metrics, []
    if metrics:
        share = f" of {status.total_steps:,} ({metrics['step'] / status.total_steps:.1%})" if status.total_steps else ""
        found.append(("step", f"{metrics['step']:,}{share}, {_ago(status.recorded_at or now, now)}"))
        found.append(("loss", _numbers(metrics, loss="{:.3f}", bits_per_byte="{:.3f} bits per byte", lr="lr {:.1e}")))
        speed = _numbers(metrics, tokens_per_second="{:,.0f} tokens/s", mfu="MFU {:.1%}")
        found.append(("speed", f"{speed}, {format_duration(metrics.get('eta_seconds'))} to go"))
    if status.saved is not None:
        found.append(("saved", f"step {status.saved[0]:,}, {_ago(status.saved[1], now)}"))
    if status.heartbeats:
        found.append(("ranks", _signs_of_life(status.heartbeats, now)))
    return found


def _signs_of_life(heartbeats: dict[int, dict[str, Any]], now: float) -> str:
    """What the ranks do, and which of them are behind the others or have said nothing for a while."""
    newest = max(of["changed"] for of in heartbeats.values())
    farthest = max((of["step"], of["activity"]) for of in heartbeats.values())
    text = f"{len(heartbeats)}, {farthest[1]} {farthest[0]:,}, last sign of life {_ago(newest, now)}"
    # Against the newest of them and not the clock here, which may differ.
    silent = [
        rank
        for rank, of in heartbeats.items()
        if newest - of["changed"] > max(SILENT_SECONDS, SILENT_INTERVALS * of.get("every_seconds", 0.0))
    ]
    behind = [rank for rank, of in heartbeats.items() if rank not in silent and of["step"] < farthest[0] - 1]
    for what, ranks in (("silent", silent), ("behind", behind)):
        if ranks:
            named = ", ".join(f"rank {rank} on {heartbeats[rank]['host']}" for rank in ranks[:8])
            text += f"; {what}: {named}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return text


def _numbers(metrics: dict[str, Any], **forms: str) -> str:
    return ", ".join(form.format(metrics[name]) for name, form in forms.items() if metrics.get(name) is not None)


def _ago(when: float, now: float) -> str:
    return f"{format_duration(max(0.0, now - when))} ago"


def _colon(reason: str) -> str:
    return f": {reason}" if reason else ""


def _ask_queue(job: str) -> str:
    command = ["squeue", "--noheader", "--job", job, "--format=%T|%M|%L|%N|%r"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "squeue does not answer here"
    lines = [line.split("|") for line in result.stdout.splitlines()]
    if not lines:
        return "not in the queue"
    if len(lines) > 1:  # a job array
        return ", ".join(sorted(line[0] for line in lines))
    state, used, left, nodes, reason = lines[0]
    return f"{state} on {nodes} for {used}, {left} left" if state == "RUNNING" else f"{state} ({reason})"


def _waiting_job(run_dir: Path, after: float) -> str | None:
    """The job that has been submitted for a run after a time, alone or in a sweep, and has not started it yet."""
    found = {when: job for when, job in submitted_jobs(run_dir) if when > after}
    return found[max(found)] if found else None


def submitted_jobs(run_dir: Path) -> Iterator[tuple[float, str]]:
    """When (seconds since 1970) and as which job a run was submitted, each time: alone, or as a task of a sweep.

    Raises ValueError for a file in the run's folder that says nothing; what lies above it may be somebody else's.
    """
    # Of `.` there would be no folder above; and what is above a link may be another one than above what it leads to.
    for where in dict.fromkeys((run_dir.absolute(), run_dir.resolve())):
        for root in (where, *where.parents):
            for file in sorted((root / run_folder.SLURM).glob(f"submission-*/{JOB}")):
                try:
                    job, runs = _read_job(file)
                    when = file.stat().st_mtime
                except (OSError, ValueError):
                    if root == where:
                        raise
                    continue
                name = str(where.relative_to(root))
                if name in runs:
                    yield when, f"{job}_{runs.index(name)}" if len(runs) > 1 else job


def _read_job(file: Path) -> tuple[str, list[str]]:
    """Its id; and the folders of its runs, as seen from the one that they share, `.` for a single one."""
    content = run_folder.read_json(file)
    if "job" not in content:
        raise ValueError(f"{file} names no job; remove it")
    return content["job"], content.get("runs", ["."])


def _newest_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    found = [
        (int(path.name.removeprefix("step_")), path.stat().st_mtime)
        for path in run_dir.glob("checkpoints/step_*")
        if path.name.removeprefix("step_").isdecimal()
    ]
    return max(found, default=None)


def _total_steps(run_dir: Path) -> int | None:
    config = run_dir / run_folder.CONFIG
    try:  # it may just be being written
        return OmegaConf.select(OmegaConf.load(config), "training.total_steps") if config.is_file() else None
    except yaml.YAMLError:
        return None


def _read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The last JSON records with `key` of a file that may be long, and that is being written."""
    found = []
    for line in _tail(path) if path.is_file() else []:
        with contextlib.suppress(ValueError):  # cut off at the beginning or at the end
            record = json.loads(line)
            if isinstance(record, dict) and key in record:
                found.append(record)
    return found


def _last(count: int, lines: list[str]) -> list[str]:
    return lines[max(0, len(lines) - max(0, count)) :]


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()


if __name__ == "__main__":
    main()
