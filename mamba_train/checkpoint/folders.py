"""Folders that appear, change and disappear at once.

A checkpoint folder gets its name by one rename when everything in it is on the disk, and loses it by
one rename before anything in it is removed, so a process may be killed at any instant and no half of
a checkpoint bears the name of a whole one. What a killed process leaves behind is removed here.
"""

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba_train.checkpoint import layout
from mamba_train.checkpoint.disk import fsync

# A leftover of another machine has no process to ask for. A save touches its folder all the time.
_ABANDONED_AFTER_SECONDS = 3600.0
_ATTEMPTS = 10

# Names of the folders that this very process is writing: its number alone does not tell them from
# leftovers, because containers give the same number to every incarnation.
_in_flight: set[str] = set()


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _seconds_untouched(folder: Path) -> float:
    newest = max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
    return time.time() - newest


def _is_abandoned(folder: Path, aside: layout.Aside) -> bool:
    if folder.name in _in_flight:
        return False
    if aside.host == socket.gethostname() and (aside.pid == os.getpid() or not _process_exists(aside.pid)):
        return True
    return _seconds_untouched(folder) > _ABANDONED_AFTER_SECONDS


def clean_up(checkpoints_dir: Path) -> None:
    """Remove what dead processes left, and give back its name to a checkpoint whose replacement never came.

    Never raises: a folder that cannot be removed (a read-only disk, another user's) stays where it is,
    and no checkpoint is ever looked for under its name.
    """
    if not checkpoints_dir.is_dir():
        return
    for folder in sorted(checkpoints_dir.iterdir()):
        aside = layout.parse_aside(folder.name)
        if aside is None:
            continue
        try:
            target = checkpoints_dir / layout.step_name(aside.step)
            if aside.purpose == layout.REPLACED and not target.exists():
                os.rename(folder, target)
            elif aside.purpose != layout.WRITING or _is_abandoned(folder, aside):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process was faster, or may not write here


@contextmanager
def staging(checkpoints_dir: Path, step: int) -> Iterator[Path]:
    """A new folder to fill; it is removed at the end unless `publish` gave it its name."""
    folder = checkpoints_dir / layout.aside_name(layout.WRITING, step)
    _in_flight.add(folder.name)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_flight.discard(folder.name)  # last: until then a clean_up in another thread must keep off


def publish(staged: Path, target: Path, step: int) -> None:
    """Give a finished folder its name; whatever bore that name before is moved aside first, then removed."""
    for path in (*(p for p in staged.rglob("*") if p.is_dir()), staged):
        fsync(path)
    for _ in range(_ATTEMPTS):
        replaced = _move_aside(target, layout.REPLACED, step)
        try:
            os.rename(staged, target)
        except OSError as error:
            # Between the two renames a reader's clean_up may have put the old folder back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        fsync(target.parent)
        _remove(replaced)
        return
    raise OSError(errno.EEXIST, "another process keeps putting a folder in this place", str(target))


def delete(checkpoint: Path) -> None:
    """Remove a checkpoint folder, its name first, so that half of it is never found."""
    step = layout.parse_step(checkpoint.name)
    if step is None:
        raise ValueError(f"{checkpoint} is not a checkpoint: expected a folder like {layout.step_name(500)}")
    _remove(_move_aside(checkpoint, layout.DELETED, step))


def _move_aside(folder: Path, purpose: str, step: int) -> Path | None:
    place = folder.with_name(layout.aside_name(purpose, step))
    try:
        os.rename(folder, place)
    except FileNotFoundError:
        return None
    return place


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
