"""The life of a run in its ledger, and a command of the user's for what somebody may want to know at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mamba_train.config import AlertsConfig
from mamba_train.monitor.event_log import EventLog
from mamba_train.training.hooks.base import Hook
from mamba_train.training.trainer import Trainer

KINDS = ("rollback", "gave up", "hang", "straggler", "stopped", "finished", "failed")
ENDS = ("gave up", "stopped", "finished")  # whose reason has been said
PREFIX = "MAMBA_TRAIN_EVENT"


class Alerts:
    """Runs `alerts.command` in a shell for each event of KINDS, in a thread; whatever it does, the training goes on.

    The event is in its environment: MAMBA_TRAIN_EVENT (the kind), MAMBA_TRAIN_EVENT_TEXT, _STEP, _RUN_DIR.
    """

    def __init__(self, config: AlertsConfig, run_dir: Path, log: Callable[[str], None]) -> None:
        self._config, self._run_dir, self._log = config, run_dir, log
        self._threads: list[threading.Thread] = []

    @property
    def longest_wait_seconds(self) -> float:
        """How long `wait` can take for one event."""
        return 0.0 if self._config.command is None else self._config.timeout_seconds + 1.0

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Run the command, and do not wait for it."""
        if self._config.command is None or event["kind"] not in KINDS:
            return
        thread = threading.Thread(target=self._run, args=(event,), name="alert", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Until the commands that were started have ended, or have been ended."""
        for thread in self._threads:
            thread.join(self._config.timeout_seconds + 1.0)
        self._threads.clear()

    def _run(self, event: Mapping[str, Any]) -> None:
        assert self._config.command is not None
        environment = {
            **os.environ,
            PREFIX: str(event["kind"]),
            f"{PREFIX}_TEXT": str(event["text"]),
            f"{PREFIX}_STEP": str(event.get("step", "")),
            f"{PREFIX}_RUN_DIR": str(self._run_dir.resolve()),
        }
        try:
            # A session of its own, so that all it has started can be ended.
            process = subprocess.Popen(
                self._config.command, shell=True, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            _, said = process.communicate(timeout=self._config.timeout_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._log(
                f"warning: alerts.command did not end within {self._config.timeout_seconds:g} s ({event['kind']})"
            )
        except Exception as error:
            self._log(f"warning: alerts.command cannot be run: {error}")
        else:
            if process.returncode:
                last = said.decode(errors="replace").strip().splitlines()[-1:]
                reason = f": {last[0][:200]}" if last else ""
                self._log(f"warning: alerts.command ended with {process.returncode} ({event['kind']}){reason}")


class LifeHook(Hook):
    """Enters starts and ends into the ledger, and lets the commands end before the process does."""

    def __init__(self, events: EventLog, alerts: Alerts) -> None:
        self._events, self._alerts = events, alerts
        self._last = ""
        events.listeners += [alerts.on_event, self._note]

    def on_start(self, trainer: Trainer) -> None:
        state, engine = trainer.state, trainer.engine
        text = f"starts after step {state.step} on {engine.world_size} ranks"
        self._events.add("start", text, step=state.step, ranks=engine.world_size)

    def on_stop(self, trainer: Trainer) -> None:
        reason = trainer.stop.reason or "another rank was asked to stop"
        step = trainer.state.step
        self._events.add("stopped", f"asked to stop, leaving after step {step} ({reason})", step=step)

    def on_end(self, trainer: Trainer) -> None:
        self._events.add("finished", f"finished after step {trainer.state.step}", step=trainer.state.step)

    def close(self, failed: bool) -> None:
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # on its way out of the trainer
            self._events.add("stopped", "interrupted by Ctrl-C; the same command goes on from the newest checkpoint")
        elif failed and self._last not in ENDS:
            self._events.add("failed", "ended with an error; the log has it")
        self._alerts.wait()

    def _note(self, event: Mapping[str, Any]) -> None:
        self._last = event["kind"]
