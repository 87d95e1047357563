"""Files of a run folder that are written anew at every start."""

import errno
import os
import re
import socket
import subprocess
import sys
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


def test_who_trains_here_is_said_with_its_machine(tmp_path: Path) -> None:
    with run_folder.lock(tmp_path):
        who = re.escape(f"process {os.getpid()} on {socket.gethostname()} is training there")
        with pytest.raises(ValueError, match=who):
            run_folder.lock(tmp_path)
