"""`ledger.jsonl`: what happened to a run besides its steps, one JSON object a line, in the order in which it happened.

Lines are only ever added. A step that a restart does again may be there twice, with two times; which steps the run as
it is now has skipped, the checkpoint says. An event is on the disk before anything is done about it.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LEDGER_NAME = "ledger.jsonl"

Listener = Callable[[Mapping[str, Any]], None]


class EventLog:
    """Where events go: into the file, and to listeners.

    run_dir: None for the ranks that write nothing; they have no listeners either. Never raises: a full disk is said
    once through `warn`, and the training goes on.
    """

    def __init__(self, run_dir: Path | None = None, warn: Callable[[str], None] = print) -> None:
        self._path = None if run_dir is None else run_dir / LEDGER_NAME
        self._warn = warn
        self._warned = False
        self.listeners: list[Listener] = []

    def add(self, kind: str, text: str, **details: Any) -> None:
        """Record an event. kind: a word; text: what a person should read; details: JSON values."""
        if self._path is None:
            return
        event = {"time": round(time.time(), 3), "kind": kind, "text": text, **details}
        try:
            append(self._path, event)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"cannot write {self._path}: {error}; training goes on without this event")
        for listener in self.listeners:
            listener(event)


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Add one line and flush it to the disk; raises OSError."""
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a torn line must not swallow this one
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run in the order in which they were written; a line that is torn is left out."""
    path = Path(run_dir) / LEDGER_NAME
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events
