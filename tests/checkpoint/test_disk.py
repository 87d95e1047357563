import errno
import os
import shutil
import stat
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mamba_train.checkpoint import Checkpoint, NotEnoughDiskSpace, disk, load, newest_complete, save

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


def _big(step: int, mib: int = 8) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((mib * MIB // 4,), float(step))})


def _pretend_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(2**50, 0, free_bytes))


def _listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_is_found_before_anything_is_written(folder, monkeypatch):
    _pretend_free(monkeypatch, 2**30 + 8 * MIB)
    with pytest.raises(NotEnoughDiskSpace) as caught:
        save(folder, _big(1), reserve_gib=1)
    message = str(caught.value)
    assert not folder.parent.exists()
    assert "\n" not in message
    for part in (str(folder), "1.009 GiB needed", "1.008 GiB free", "checkpoint.reserve_gib"):
        assert part in message
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC


def test_the_reserve_counts(folder, monkeypatch):
    _pretend_free(monkeypatch, 10 * MIB)
    with pytest.raises(NotEnoughDiskSpace):
        save(folder, _big(1), reserve_gib=0.01)
    save(folder, _big(1), reserve_gib=0)


def test_all_groups_of_tensors_count(folder, monkeypatch):
    _pretend_free(monkeypatch, 20 * MIB)
    checkpoint = _big(1)
    checkpoint.optimizer = {"w.exp_avg": torch.zeros(2 * MIB), "w.exp_avg_sq": torch.zeros(2 * MIB)}
    with pytest.raises(NotEnoughDiskSpace):
        save(folder, checkpoint, reserve_gib=0)


def test_leftovers_are_removed_before_the_space_is_counted(folder, monkeypatch):
    leftover = folder / f"writing.step_00000001.{os.uname().nodename}.{os.getpid()}.0123abcd"
    leftover.mkdir(parents=True)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(2**50, 0, 0 if leftover.exists() else 2**40))
    save(folder, _big(1), reserve_gib=1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after_writes", range(10))
def test_a_disk_that_fills_up_on_the_way(folder, make_checkpoint, monkeypatch, number, after_writes):
    save(folder, make_checkpoint(1), reserve_gib=0)
    fsync, calls = os.fsync, iter(range(1000))

    def full(descriptor):
        if next(calls) == after_writes:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotEnoughDiskSpace, match="became full during the save"):
        save(folder, make_checkpoint(2), reserve_gib=0)
    assert _listing(folder) == ["step_00000001"]


def test_other_errors_keep_their_name(folder, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        save(folder, _big(1), reserve_gib=0)
    assert not isinstance(caught.value, NotEnoughDiskSpace)
    assert _listing(folder) == []


def test_folders_that_a_filesystem_cannot_flush_are_no_reason_to_fail(folder, monkeypatch):
    """For files it must work."""
    fsync = os.fsync

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    path = save(folder, _big(1), reserve_gib=0)
    assert newest_complete(folder, pytest.fail) == path

    def of_folders_only(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", of_folders_only)
    with pytest.raises(OSError, match="Invalid argument"):
        save(folder, _big(2), reserve_gib=0)


@pytest.fixture
def tiny_disk(tmp_path):
    """A real filesystem of 12 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk(tiny_disk):
    folder = tiny_disk / "checkpoints"
    save(folder, _big(1, mib=4), reserve_gib=0)
    with pytest.raises(NotEnoughDiskSpace, match="no space for a checkpoint"):
        save(folder, _big(2), reserve_gib=0)
    assert _listing(folder) == ["step_00000001"]
    save(folder, _big(2, mib=4), reserve_gib=0)
    assert newest_complete(folder, pytest.fail) == folder / "step_00000002"


@pytest.mark.parametrize("left_kib", [0, 4, 8, 1024, 4096])
def test_a_small_disk_that_fills_up_on_the_way(tiny_disk, monkeypatch, left_kib):
    """The check is made to see a large disk; then the real one says that it is full."""
    folder = tiny_disk / "checkpoints"
    save(folder, _big(1, mib=4), reserve_gib=0)
    filler = tiny_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(tiny_disk).free - left_kib * 1024))
    _pretend_free(monkeypatch, 2**40)
    with pytest.raises(NotEnoughDiskSpace, match="became full during the save"):
        save(folder, _big(2), reserve_gib=0)
    assert _listing(folder) == ["step_00000001"]
    path = newest_complete(folder, pytest.fail)
    assert path is not None
    assert torch.equal(load(path).model["w"], _big(1, mib=4).model["w"])
    filler.unlink()
    save(folder, _big(2, mib=4), reserve_gib=0)
