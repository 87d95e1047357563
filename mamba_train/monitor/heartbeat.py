"""Signs of life: each rank writes a small file in the run folder every few seconds, which anyone may read.

A file says what the process is doing and since when. Whether it is alive shows when the file changes: the clocks of two
machines need not agree, and on a disk that they share the time of a change is mostly that of one clock.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
SIZE = 512  # characters, mostly the same at each time: a shorter content over a longer one would be torn for a moment


class Heartbeat:
    """The file of one rank, written in place; a disk that fails is no reason to fail."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / FOLDER / f"rank_{rank:05d}.json"

    def write(self, values: dict[str, Any]) -> None:
        """Replace what the file says, in one write, so that nobody reads half of it."""
        content = json.dumps(values).ljust(SIZE).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Closed each time: until then NFS may keep it from the other machines.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
                os.ftruncate(descriptor, len(content))  # of one that was longer
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """The process ends in good order: it leaves no sign of life behind."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_heartbeats(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What each rank last said, by rank, and when (`changed`); one that is being written just now may be missing."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            values = json.loads(path.read_text())
            found[int(values["rank"])] = {**values, "changed": path.stat().st_mtime}
    return found


def forget_ranks(run_dir: Path, world_size: int) -> None:
    """Remove what an earlier start with more ranks has left."""
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        if int(path.stem.removeprefix("rank_")) >= world_size:
            with contextlib.suppress(OSError):
                path.unlink()
