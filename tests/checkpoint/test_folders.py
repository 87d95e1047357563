import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba_train.checkpoint import folders, layout, load, newest_complete, save


def _leftover(folder: Path, purpose: str = "writing", *, host: str | None = None, pid: int | None = None) -> Path:
    own = layout.parse_aside(layout.aside_name(purpose, 7))
    assert own is not None
    path = folder / f"{purpose}.step_00000007.{host or own.host}.{own.pid if pid is None else pid}.0123abcd"
    (path / "model").mkdir(parents=True)
    (path / "model" / "rank_00000.safetensors").write_bytes(b"half")
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("purpose", ["writing", "deleted"])
@pytest.mark.parametrize("by", ["scan", "save"])
def test_leftovers_of_a_dead_process_are_removed(folder, make_checkpoint, dead_pid, purpose, by):
    path = _leftover(folder, purpose, pid=dead_pid)
    if by == "scan":
        assert newest_complete(folder, pytest.fail) is None
    else:
        save(folder, make_checkpoint(1), reserve_gib=0)
    assert not path.exists()


def test_a_leftover_with_our_own_number_is_removed(folder):
    """Containers give every incarnation of a process the same number."""
    path = _leftover(folder, pid=os.getpid())
    newest_complete(folder, pytest.fail)
    assert not path.exists()


def test_what_a_living_process_writes_is_left_alone(folder):
    path = _leftover(folder, pid=os.getppid())
    newest_complete(folder, pytest.fail)
    assert path.exists()


def test_what_this_process_is_writing_is_left_alone(folder, make_checkpoint):
    save(folder, make_checkpoint(1), reserve_gib=0)
    with folders.staging(folder, 2) as staged:
        newest_complete(folder, pytest.fail)
        save(folder, make_checkpoint(3), reserve_gib=0)
        assert staged.exists()
    assert not staged.exists()


def test_another_machines_leftover_is_removed_after_an_hour(folder):
    path = _leftover(folder, host="elsewhere")
    newest_complete(folder, pytest.fail)
    assert path.exists(), "it may be being written"
    long_ago = time.time() - 4000
    inner = path / "model" / "rank_00000.safetensors"
    for each in (path, path / "model"):
        os.utime(each, (long_ago, long_ago))
    newest_complete(folder, pytest.fail)
    assert path.exists(), "one of its files was touched just now"
    os.utime(inner, (long_ago, long_ago))
    newest_complete(folder, pytest.fail)
    assert not path.exists()


def test_other_peoples_files_are_left_alone(folder, make_checkpoint):
    for name in ("writing.txt", "deleted.step_1", "backup"):
        (folder / name).mkdir(parents=True)
    save(folder, make_checkpoint(1), reserve_gib=0)
    assert {path.name for path in folder.iterdir()} == {"writing.txt", "deleted.step_1", "backup", "step_00000001"}


def test_a_checkpoint_whose_replacement_never_came_is_put_back(folder, make_checkpoint, assert_same):
    path = save(folder, make_checkpoint(7), reserve_gib=0)
    path.rename(folder / "replaced.step_00000007.elsewhere.1.0123abcd")
    assert newest_complete(folder, pytest.fail) == path
    assert_same(load(path), make_checkpoint(7))


def test_a_disk_that_may_only_be_read_is_no_reason_to_fail(folder, make_checkpoint, monkeypatch):
    path = save(folder, make_checkpoint(6), reserve_gib=0)
    _leftover(folder, "replaced", host="elsewhere")

    def read_only(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", read_only)
    assert newest_complete(folder, pytest.fail) == path


def test_a_process_of_another_user_lives(folder, monkeypatch):
    def not_permitted(pid, number):
        raise PermissionError("Operation not permitted")

    path = _leftover(folder, pid=1)
    monkeypatch.setattr(os, "kill", not_permitted)
    newest_complete(folder, pytest.fail)
    assert path.exists()


def test_a_replaced_checkpoint_never_comes_back_later(folder, make_checkpoint):
    path = save(folder, make_checkpoint(7), reserve_gib=0)
    _leftover(folder, "replaced", host="elsewhere")
    newest_complete(folder, pytest.fail)
    folders.delete(path)
    assert newest_complete(folder, pytest.fail) is None
    assert list(folder.iterdir()) == []


def test_a_reader_that_puts_the_old_folder_back_does_not_stop_the_save(
    folder, make_checkpoint, assert_same, monkeypatch
):
    save(folder, make_checkpoint(7), reserve_gib=0)
    rename = os.rename
    meddled = []

    def meddling_rename(source, target):
        rename(source, target)
        if "replaced." in str(target) and not meddled:
            meddled.append(target)
            folders.clean_up(folder)

    monkeypatch.setattr(os, "rename", meddling_rename)
    path = save(folder, make_checkpoint(7, seed=1), reserve_gib=0)
    assert meddled
    assert_same(load(path), make_checkpoint(7, seed=1))
    assert [p.name for p in folder.iterdir()] == ["step_00000007"]


def test_a_disk_that_fails_at_the_last_moment_is_named(folder, make_checkpoint, assert_same, monkeypatch):
    save(folder, make_checkpoint(7), reserve_gib=0)
    rename = os.rename

    def failing(source, target):
        if str(target).endswith("/step_00000007"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            save(folder, make_checkpoint(7, seed=1), reserve_gib=0)
    path = newest_complete(folder, pytest.fail)
    assert_same(load(path), make_checkpoint(7))


def test_deletion_takes_the_name_first(folder, make_checkpoint, monkeypatch):
    path = save(folder, make_checkpoint(7), reserve_gib=0)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    folders.delete(path)
    assert not path.exists()
    assert newest_complete(folder, pytest.fail) is None


def test_only_checkpoints_are_deleted(tmp_path):
    with pytest.raises(ValueError, match="not a checkpoint"):
        folders.delete(tmp_path)
    assert tmp_path.exists()
