"""A step that hangs: found out, described, and ended so that the run can start again.

A thread of each rank writes a sign of life every few seconds and looks at the clock. A collective operation that waits
for a rank that does not come hangs on all ranks, so each of them finds out by itself: it writes the Python stacks of
all its threads and, where there is one, NCCL's flight record into the run folder, names the ranks that give no sign of
life, and leaves with EXIT_RESTART. Whoever started the processes (torchrun, srun) ends the others.

Waiting for data has a limit of its own, as a stream may be patient with its server. The other ranks wait in the step
meanwhile: as long as a rank is alive and waits for its data, their time does not count. Nor does the time in which a
process was stopped: SLURM wakes a stopped one to end it, when the others have said long ago what happened. (Up to
BACKSTOP_SECONDS beyond the limit: what ends a process that cannot run Python asks nobody.)
"""

import atexit
import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from mamba_train.config import WatchdogConfig
from mamba_train.data.loader import BatchLoader
from mamba_train.monitor.event_log import EventLog
from mamba_train.monitor.heartbeat import Heartbeat, forget_ranks, read_heartbeats
from mamba_train.ranks import Ranks
from mamba_train.training.hooks.alerts import Alerts
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.preemption import EXIT_RESTART
from mamba_train.training.trainer import Trainer

FOLDER = "hangs"
# A thread that cannot run, as the interpreter's lock is held in a call that hangs, is noticed so much later.
BACKSTOP_SECONDS = 60.0
# Signs of life are compared over so many intervals.
SILENT_INTERVALS = 3
# So much later than the others may the rank be that speaks for them: each looks at the clock once in an interval.
SPEAKER_INTERVALS = 2


IN_STEP = ("first step", "step")
DATA = "data of step"


@dataclass(frozen=True)
class _Activity:
    name: str
    step: int  # the one that is being made
    since: float  # time.monotonic()
    limit_seconds: float


class _EndOfHooks(Hook):
    def __init__(self, watchdog: "WatchdogHook") -> None:
        self._watchdog = watchdog

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        step = trainer.state.step + 1
        self._watchdog.begin("step" if step > self._watchdog.first_step else "first step", step)


class WatchdogHook(Hook):
    """The first hook of the list; `at_end` is the last one.

    The first step has a long limit, as there is something to compile and to open; so have the start-up, which loads,
    and the hooks between two steps, which validate and save.
    """

    def __init__(
        self, run_dir: Path, config: WatchdogConfig, data_seconds: float, ranks: Ranks, alerts: Alerts
    ) -> None:
        """data_seconds: how long a rank may wait for the data of a step."""
        self._run_dir, self._config, self._ranks, self._alerts = run_dir, config, ranks, alerts
        self._data_seconds = data_seconds
        self._loader: BatchLoader | None = None
        self._others_waited_at = 0.0  # when another rank was last seen waiting for its data
        self._losses: list[tuple[float, float]] = []  # when this process went on after a stop, and how long that was
        self._host = platform.node()
        self._heartbeat = Heartbeat(run_dir, ranks.rank)
        self.begin("start", 0)
        self.first_step = 0  # of this start
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._backstop: IO[str] | None = None
        self.at_end: Hook = _EndOfHooks(self)

    def begin(self, name: str, step: int) -> None:
        """Say what the main thread does from now on."""
        config = self._config
        limits = {"first step": config.first_step_seconds, "step": config.step_seconds}
        limit = limits.get(name, config.between_steps_seconds)
        self._activity, self._losses = _Activity(name, step, time.monotonic(), limit), []

    def start(self) -> None:
        """Watch from now on; the run folder is this run's. Several ranks are watched from their start-up on."""
        self.begin("start", 0)
        if self._ranks.rank == 0:
            forget_ranks(self._run_dir, self._ranks.world_size)
        if self._config.enabled:
            self._ranks.wait_as_watched()
            atexit.register(self.close, failed=True)  # after a start-up that has failed nobody else closes it
            self._beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def on_start(self, trainer: Trainer) -> None:
        if self._thread is None:
            self.start()
        self.first_step = trainer.state.step + 1
        self._loader = trainer.loader
        if self._config.enabled:
            self._ranks.wait_as_watched()  # in the groups of the engine, too
        self.begin("first step", self.first_step)

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        self.begin("after the step", trainer.state.step)

    def on_stop(self, trainer: Trainer) -> None:
        self.begin("stopping", trainer.state.step)

    def on_end(self, trainer: Trainer) -> None:
        self.begin("finishing", trainer.state.step)

    def close(self, failed: bool) -> None:
        atexit.unregister(self.close)
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._backstop is not None:
            with contextlib.suppress(OSError):
                self._backstop.close()
                if not Path(self._backstop.name).stat().st_size:
                    Path(self._backstop.name).unlink()
        self._heartbeat.close()

    def _now(self) -> _Activity:
        """What the main thread does; in a step, the time that it or another rank has waited for data is left out."""
        activity, loader = self._activity, self._loader
        if loader is not None and activity.name in IN_STEP:
            waiting_since = loader.waiting_since
            if waiting_since is None:
                activity = replace(activity, since=max(activity.since, loader.came_at, self._others_waited_at))
            else:
                of_first_step = activity.limit_seconds if activity.name == "first step" else 0.0
                limit = max(self._data_seconds, of_first_step)
                activity = _Activity(DATA, activity.step, waiting_since, limit)
        # The main thread may have begun something new before this one noticed the stop, of which then nothing counts.
        lost = sum(min(seconds, max(0.0, back_at - activity.since)) for back_at, seconds in self._losses)
        return replace(activity, since=activity.since + lost)

    def _watch(self) -> None:
        pause = min(self._config.heartbeat_seconds, self._config.step_seconds / 4)
        while True:
            activity, began = self._now(), time.monotonic()
            self._beat()
            self._set_backstop(max(activity.since + activity.limit_seconds - began, 0) + pause)
            if self._closed.wait(pause):
                return
            # Wherever in here it was stopped, that is known before it is said that something takes too long.
            self._excuse(time.monotonic() - began - pause, pause)
            activity = self._now()
            if time.monotonic() - activity.since > activity.limit_seconds:
                self._end(activity)

    def _excuse(self, late_seconds: float, pause: float) -> None:
        """Do not count the time by which a round of this thread took longer than its pause.

        That puts nothing off for ever, as the pause itself counts each time.
        """
        if late_seconds > pause:
            self._losses.append((time.monotonic(), late_seconds))

    def _beat(self) -> None:
        activity = self._now()
        self._heartbeat.write(
            {
                "rank": self._ranks.rank,
                "host": self._host,
                "pid": os.getpid(),
                "activity": activity.name,
                "step": activity.step,
                "for_seconds": round(time.monotonic() - activity.since, 1),
                "every_seconds": self._config.heartbeat_seconds,
                "time": round(time.time(), 2),
            }
        )

    def _set_backstop(self, seconds: float) -> None:
        """C code writes the stacks and ends the process BACKSTOP_SECONDS after this thread should have come back."""
        if self._backstop is None:
            path = self._run_dir / FOLDER / f"rank_{self._ranks.rank:05d}_without_python.txt"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._backstop = path.open("w")
            except OSError:
                return
        faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=self._backstop)

    def _end(self, activity: _Activity) -> None:
        interval, rank = self._config.heartbeat_seconds, self._ranks.rank
        longest_alert = self._alerts.longest_wait_seconds
        self._set_backstop((2 * SILENT_INTERVALS + SPEAKER_INTERVALS) * interval + longest_alert)
        if activity.name in IN_STEP and self._others_wait_for_data():
            return
        files = self._write_evidence(activity)
        before = read_heartbeats(self._run_dir)
        self._stay(SILENT_INTERVALS * interval)
        if self._closed.is_set() or self._now() != activity:
            return  # it was only slow, and has gone on meanwhile
        now = read_heartbeats(self._run_dir)
        silent = [other for other in before if other != rank and before[other] == now.get(other)]
        text = self._text(activity, now, silent)
        # One of those who find it out: a rank that is elsewhere may have an hour left.
        here = [
            other
            for other, of in now.items()
            if other not in silent and (of["activity"], of["step"]) == (activity.name, activity.step)
        ]
        if rank == min([rank, *here]):
            log = EventLog(self._run_dir)
            log.listeners.append(self._alerts.on_event)
            log.add("hang", text, step=activity.step, silent=silent, files=files)
            self._alerts.wait()
        else:
            # Whoever leaves first takes the others along, with srun at once: the one who says it must be the first.
            self._stay(SPEAKER_INTERVALS * interval + longest_alert)
        os.write(sys.stderr.fileno(), f"error: {text}\n".encode())
        os._exit(EXIT_RESTART)

    def _others_wait_for_data(self) -> bool:
        """Whether another rank is alive and waits for its data, or has until now."""
        before = {rank: of for rank, of in read_heartbeats(self._run_dir).items() if of["activity"] == DATA}
        if not before:
            return False
        self._stay(SILENT_INTERVALS * self._config.heartbeat_seconds)
        now = read_heartbeats(self._run_dir)
        alive = any(now.get(rank) != of for rank, of in before.items())
        if alive:
            self._others_waited_at = time.monotonic()
        return alive

    def _stay(self, seconds: float) -> None:
        """Go on giving signs of life, until the run is closed."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closed.wait(min(left, self._config.heartbeat_seconds)):
            self._beat()

    def _text(self, activity: _Activity, now: dict[int, dict[str, Any]], silent: list[int]) -> str:
        what = f"{activity.name} {activity.step}" if "step" in activity.name else activity.name
        text = f"{what} has not ended within {activity.limit_seconds:g} s"
        if activity.name == DATA:
            text = (
                f"the data of step {activity.step} has not come within {activity.limit_seconds:g} s "
                f"(watchdog.data_seconds) to rank {self._ranks.rank} on {self._host}"
            )
        if silent:
            named = [f"rank {rank} (process {now[rank]['pid']} on {now[rank]['host']})" for rank in silent]
            return f"{text}: no sign of life of {', '.join(named)}"
        if activity.name == DATA:
            return f"{text}: look at the disk or the server that it comes from"
        places = sorted({(of["activity"], of["step"]) for of in now.values()})
        others = [rank for rank, of in now.items() if (of["activity"], of["step"]) != (activity.name, activity.step)]
        if others and len(places) > 1:
            named = [
                f"rank {rank} on {now[rank]['host']} ({now[rank]['activity']} {now[rank]['step']})" for rank in others
            ]
            return f"{text}; elsewhere: {', '.join(named[:8])}"
        return f"{text}; all ranks are alive and in it: {FOLDER}/ in the run folder says where each of them is"

    def _write_evidence(self, activity: _Activity) -> list[str]:
        """The Python stacks of this process, and torch's record of its last collective operations."""
        written = []
        stem = self._run_dir / FOLDER / f"step_{activity.step:08d}_rank_{self._ranks.rank:05d}"
        with contextlib.suppress(OSError):
            stem.parent.mkdir(parents=True, exist_ok=True)
            with stem.with_suffix(".txt").open("w") as file:
                file.write(f"rank {self._ranks.rank}, process {os.getpid()} on {self._host}, {activity.name}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            written.append(stem.with_suffix(".txt").name)
            if self._ranks.world_size > 1 and (record := flight_record()):
                stem.with_suffix(".collectives.json").write_bytes(record)
                written.append(stem.with_suffix(".collectives.json").name)
        return written


def flight_record() -> bytes | None:
    """What torch's flight recorder knows of the last collective operations (of NCCL, on the CPU of gloo), in JSON."""
    import torch

    try:  # not a public interface: whatever it does must not keep the process from ending
        c10d = torch._C._distributed_c10d
        dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json")  # noqa: B009
        record: bytes | str = dump()
    except Exception:
        return None
    return record if isinstance(record, bytes) else record.encode()
