"""Files of a run folder that are written anew at every start."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mamba_train import run_folder
from tests.helpers import REPOSITORY


def test_what_was_there_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    run_folder.replace(path, b"first")
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match=r"No space left on device: .*tokenizer.json'"):
        run_folder.replace(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path], "what is left of it would keep the disk full"
    monkeypatch.undo()
    run_folder.replace(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"


def test_two_processes_do_not_write_into_each_other(tmp_path: Path) -> None:
    """Each of two processes replaces the file again and again, by contents of one letter."""
    path = tmp_path / "baseline.json"
    command = "from pathlib import Path; from mamba_train.run_folder import replace; import sys\n"
    command += "for _ in range(200): replace(Path(sys.argv[1]), sys.argv[2] * 200_000)"
    writers = [
        subprocess.Popen([sys.executable, "-c", command, str(path), letter], cwd=REPOSITORY, env=os.environ.copy())
        for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_text()
            seen.add((len(content), *sorted(set(content))))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {(200_000, "a"), (200_000, "b")}
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_summary(tmp_path, n_parameters=1, data_folder=tmp_path)
    monkeypatch.setattr(run_folder.os, "replace", lambda *_: None)
    run_folder.write_summary(tmp_path, n_parameters=2, data_folder=tmp_path)  # killed before its last moment
    assert run_folder.read_summary(tmp_path)["n_parameters"] == 1


def test_only_one_process_has_the_folder_and_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / run_folder.LOCK).write_text("999999999999")  # of a process that is gone
    first = run_folder.lock(run_dir)
    for _ in range(2):  # whoever has failed leaves the name of the one that trains
        who = re.escape(f"process {os.getpid()} on {socket.gethostname()} is training there; wait for it")
        with pytest.raises(ValueError, match=f"run_dir=.*run: {who}"):
            run_folder.lock(run_dir)
    first.close()
    run_folder.lock(run_dir).close()


def test_whoever_is_patient_has_the_folder_next(tmp_path: Path) -> None:
    first = run_folder.lock(tmp_path)
    timer = threading.Timer(0.2, first.close)
    timer.start()
    run_folder.lock(tmp_path, patience_seconds=60).close()
    timer.join()


def test_a_filesystem_without_locks_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", without)
    run_folder.lock(tmp_path).close()
