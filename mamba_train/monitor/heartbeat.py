"""Signs of life: each rank writes a small file in the run folder every few seconds, which anyone may read.

A file says what the process is doing and since when. Whether it is alive shows when the file changes, not by its times:
the clocks of two machines need not agree.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"


class Heartbeat:
    """The file of one rank, kept open and written in place; a disk that fails is no reason to fail."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / FOLDER / f"rank_{rank:05d}.json"
        self._descriptor: int | None = None

    def write(self, values: dict[str, Any]) -> None:
        """Replace what the file says."""
        content = json.dumps(values).encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))

    def close(self) -> None:
        """The process ends in good order: it leaves no sign of life behind."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
                self._path.unlink(missing_ok=True)
            self._descriptor = None


def read_heartbeats(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What each rank last said, by rank; one that is being written just now may be missing."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            values = json.loads(path.read_text())
            found[int(values["rank"])] = values
    return found


def forget_ranks(run_dir: Path, world_size: int) -> None:
    """Remove what an earlier start with more ranks has left."""
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        if int(path.stem.removeprefix("rank_")) >= world_size:
            with contextlib.suppress(OSError):
                path.unlink()
