"""One run on three ranks and all that may happen to it: `python -m tests.distributed.chaos --events 50 --seed 1`.

Events are drawn from the seed, about ten steps apart. Those from inside (a NaN in the gradient of one rank, a spike, a
stretch of NaNs that leads to a rollback, a full disk, a tracker that breaks) are in a plan that the ranks read
(`chaos_rank.py`); those from outside (signals, kills, a stopped rank, a torn checkpoint) are done here, and whenever
the run has ended before its last step it is started again, as a scheduler would. A second run has the same faults in
its numbers and is otherwise left alone: both must agree bit by bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_train.checkpoint.layout import step_folders
from mamba_train.monitor.event_log import read_events
from mamba_train.monitor.heartbeat import FOLDER, read_heartbeats
from tests.distributed.launch import child_environment, overrides, torchrun
from tests.helpers import REPOSITORY, metrics, write_corpus

RANKS = 3
SPACING = 10  # steps between two events
INTERVAL = 5  # between two checkpoints
FAULTS = ("nan", "spike", "stretch")
INSIDE = (*FAULTS, "full disk", "tracker")
OUTSIDE = ("term", "usr1", "kill", "kill all", "stop", "torn")
SETTINGS = [
    "engine=ddp", "training.global_batch_size=6", f"checkpoint.interval_steps={INTERVAL}", "checkpoint.keep_last=3",
    "checkpoint.verify_forward=false", "schedule=constant", "schedule.warmup_steps=5", "logging.wandb=offline",
    "training.validation_interval_steps=25", "guard.window_steps=12", "guard.min_steps=6", "guard.rollback_after=3",
    "watchdog.heartbeat_seconds=0.5", "watchdog.step_seconds=10", "watchdog.between_steps_seconds=40",
    "watchdog.straggler_interval_steps=20", "watchdog.straggler_ratio=100",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """kind: of INSIDE or OUTSIDE; step: at which, or from which on; rank: that it is done to."""

    kind: str
    step: int
    rank: int


def draw(n_events: int, seed: int) -> list[Event]:
    """Every kind comes once before any comes again, in an order of the seed; faults of numbers not before step 12."""
    generator = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < n_events:
        kinds += generator.sample([*INSIDE, *OUTSIDE], len(INSIDE) + len(OUTSIDE))
    events = []
    for number, kind in enumerate(kinds[:n_events]):
        step = 12 + number * SPACING + generator.randrange(4)
        if kind == "full disk":
            step = -(-step // INTERVAL) * INTERVAL  # the step of a save
        events.append(Event(kind, step, generator.randrange(RANKS)))
    return events


class Run:
    """A run in `folder`, its processes and its log."""

    def __init__(self, folder: Path, corpus: Path, events: list[Event], total_steps: int) -> None:
        folder.mkdir(parents=True)
        inside = [vars(event) for event in events if event.kind in INSIDE]
        (folder / "plan.json").write_text(json.dumps(inside))
        self.run_dir = folder / "run"
        self.log = folder / "log"
        self._arguments = overrides(corpus, self.run_dir, *SETTINGS, f"training.total_steps={total_steps}")
        self._total_steps = total_steps
        self.n_starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for path in (self.run_dir / FOLDER).glob("*"):
            path.unlink()  # of processes that were killed
        self.n_starts += 1
        command = torchrun(RANKS, str(REPOSITORY / "tests/distributed/chaos_rank.py"), *self._arguments)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=child_environment(),
                start_new_session=True,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    @property
    def last_step(self) -> int:
        if not (self.run_dir / "metrics.jsonl").is_file():
            return 0
        with contextlib.suppress(ValueError):
            return max((record["step"] for record in metrics(self.run_dir)), default=0)
        return 0

    @property
    def finished(self) -> bool:
        return self.ended and self.process is not None and self.process.returncode == 0

    def go_until(self, condition: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: it did not happen\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def pids(self) -> list[int]:
        beats = read_heartbeats(self.run_dir)
        return [beats[rank]["pid"] for rank in sorted(beats)]

    def kill_all(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def disturb(run: Run, event: Event) -> None:
    """Do an event from outside to a run, which begins a start if there is none, and wait until it has ended."""
    begun, pids = -1, list[int]()

    def has_come_far_enough() -> bool:
        nonlocal begun, pids
        if run.ended:
            assert not run.finished, f"the run was over before {event}"
            run.start()
            begun = -1
        if len(pids := run.pids()) < RANKS:
            return False
        if begun < 0:
            begun = run.last_step
        return run.last_step >= max(event.step, begun + 2)

    run.go_until(has_come_far_enough, str(event))
    if event.kind in ("kill all", "torn"):
        run.kill_all()
        if event.kind == "torn":
            tear_newest(run.run_dir)
        return
    signals = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    n_hangs = count(run.run_dir, "hang")
    for pid in pids if event.kind == "term" else [pids[event.rank]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signals[event.kind])
    if event.kind == "stop":
        run.go_until(lambda: count(run.run_dir, "hang") > n_hangs or run.ended, str(event))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[event.rank], signal.SIGKILL)  # as srun does; torchrun gives it half a minute
    run.go_until(lambda: run.ended, str(event))


def tear_newest(run_dir: Path) -> None:
    """Cut the largest file of the newest checkpoint in half, if there is an older one."""
    folders = step_folders(run_dir / "checkpoints")
    assert len(folders) > 1
    largest = max((path for path in folders[0][1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def count(run_dir: Path, kind: str) -> int:
    return sum(event["kind"] == kind for event in read_events(run_dir))


def finish(run: Run, limit: int) -> None:
    """To the last step, in as many starts as it takes."""
    while not run.finished:
        assert run.n_starts < limit, f"{limit} starts\n{run.log.read_text()[-3000:]}"
        run.start()
        run.go_until(lambda: run.ended, "a start")


def chaos(folder: Path, corpus: Path, n_events: int, seed: int, say: Callable[[str], None] = print) -> None:
    """Raises AssertionError, naming what, unless the run comes out as it must."""
    events = draw(n_events, seed)
    total_steps = events[-1].step + 5 * SPACING
    say(f"seed {seed}, {n_events} events, {total_steps} steps: " + ", ".join(f"{e.kind} {e.step}" for e in events))
    run = Run(folder / "disturbed", corpus, events, total_steps)
    try:
        for event in events:
            if event.kind in OUTSIDE:
                disturb(run, event)
                say(f"{event.kind} to rank {event.rank} at step {run.last_step}; start {run.n_starts}")
        if run.process is not None and not run.ended:
            run.go_until(lambda: run.ended, "the rest")
        finish(run, n_events + 10)
        calm = Run(folder / "calm", corpus, [event for event in events if event.kind in FAULTS], total_steps)
        calm.start()
        calm.go_until(lambda: calm.ended, "the run that is left alone", 1200.0)
        assert calm.finished, calm.log.read_text()[-3000:]
        check(run, calm, events, total_steps)
    finally:
        if not run.ended:
            run.kill_all()
    skipped = sum(record["skipped"] for record in metrics(run.run_dir))
    say(f"finished after {run.n_starts} starts; {skipped} steps made no update; both runs agree bit by bit")


def check(run: Run, calm: Run, events: list[Event], total_steps: int) -> None:
    """The record, the ledger and the curve of the disturbed run against its plan and the run that was left alone."""
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "skipped", "validation/loss")
    ours, theirs = ([[r.get(key) for key in keys] for r in metrics(of.run_dir)] for of in (run, calm))
    assert [row[0] for row in ours] == list(range(1, total_steps + 1)), "each step once"
    different = [row[0] for row, other in zip(ours, theirs, strict=True) if row != other]
    assert not different, f"other than without disturbance: steps {different[:10]}"
    states = [last_state(of.run_dir) for of in (run, calm)]
    assert states[0]["ledger"] == states[1]["ledger"]
    assert states[0]["skipped_steps"] == [row[0] for row in ours if row[5]]

    log = read_events(run.run_dir)
    skipped = {event["step"] for event in log if event["kind"] == "skip"}
    wanted = {(e.step + i) for e in events if e.kind in FAULTS for i in range(3 if e.kind == "stretch" else 1)}
    assert skipped == wanted == {entry["step"] for entry in states[0]["ledger"] if entry["action"] == "skip"}
    rollbacks = {event["step"] for event in log if event["kind"] == "rollback"}
    assert rollbacks == {e.step + 2 for e in events if e.kind == "stretch"}
    in_log = {"full disk": "disk full", "tracker": "tracking", "torn": "damaged checkpoint", "stop": "hang"}
    for kind, name in in_log.items():
        n_planned = sum(event.kind == kind for event in events)
        assert sum(event["kind"] == name for event in log) >= n_planned, f"{kind} is not in the ledger"
    asked = sum(event.kind in ("term", "usr1") for event in events)
    assert sum(event["kind"] == "stopped" for event in log) == asked
    assert sum(event["kind"] == "start" for event in log) == run.n_starts
    assert log[-1]["kind"] == "finished"


def last_state(run_dir: Path) -> dict[str, Any]:
    _, newest = step_folders(run_dir / "checkpoints")[0]
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())["train"]
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go; it must not exist")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp()) / "chaos"
    corpus = write_corpus(folder / "corpus")
    chaos(folder, corpus, args.events, args.seed, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
