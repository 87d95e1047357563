"""Asked to stop: by a signal of the scheduler or of a person, or because the job's time is almost over.

A request is local to the process that got it. The trainer adds it to a reduction that every step makes anyway, so
all ranks learn of it in the same step, finish that step, save, and leave with EXIT_RESTART, which says "start me
again". Before the end of this process's first step (imports, data preparation, compilation) there is nothing to save
that a checkpoint does not hold already: then the process leaves at once.

Python runs a signal handler only between two bytecodes of the main thread, which may sit for minutes in a
compiler or a collective. So the handlers do nothing, and a thread reads the numbers that the interpreter's C handler
writes into a pipe at once (`signal.set_wakeup_fd`). No torch here: listening begins before it is imported.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

END_TIME = "SLURM_JOB_END_TIME"  # seconds since the epoch; older SLURMs do not set it, our batch script does
SAVE_MARGIN = 1.5  # a save takes at most so many times what it took before
SLACK_SECONDS = 10.0  # to close the run, and for a clock that is off


class Stopped(Exception):
    """The run was asked to stop, and has been saved: the same command goes on from there."""


class StopRequest:
    """Whether this process has been asked to stop, and why."""

    def __init__(self, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.time) -> None:
        self.reason: str | None = None
        self._clock = clock
        self._end_time = float(environment[END_TIME]) if environment.get(END_TIME, "").isdecimal() else None
        self._lock = threading.Lock()
        self._nothing_to_save = True

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 are requests; to be called from the main thread."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        os.register_at_fork(after_in_child=_forget)
        atexit.register(_ignore)
        threading.Thread(target=self._watch, args=(read_end,), name="signals", daemon=True).start()

    def first_step_done(self) -> None:
        """There is something to save now: a request waits for the end of the step."""
        with self._lock:
            self._nothing_to_save = False

    def requested(self, step_seconds: float = 0.0, save_seconds: float = 0.0) -> bool:
        """Whether to stop now, given what another step and a save are known to take.

        The save in question may have to wait for another one in flight: two are reckoned with.
        """
        if self.reason is None and self._end_time is not None:
            left = self._end_time - self._clock()
            if left < step_seconds + 2 * SAVE_MARGIN * save_seconds + SLACK_SECONDS:
                self._ask(f"the job's time limit is {max(left, 0):.0f} s away")
        return self.reason is not None

    def _watch(self, read_end: int) -> None:
        while received := os.read(read_end, 1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            with self._lock:
                if self._nothing_to_save:
                    _say(f"{name}: leaving before the first step of this start, there is nothing to save")
                    os._exit(EXIT_RESTART)  # the main thread may be anywhere; the run survives a kill at any instant
            self._ask(name)

    def _ask(self, reason: str) -> None:
        if self.reason is None:  # a second request changes nothing
            self.reason = reason
            _say(f"{reason}: stopping after this step")


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\n".encode())  # whole lines, whatever the main thread is printing


def _ignore() -> None:
    """While the interpreter shuts down it puts back the default, to die, unless a signal is ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """In a forked child: its signals are not requests to the run, and `terminate` must work."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
