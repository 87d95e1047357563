"""Files of a run folder that are written anew at every start."""

import errno
from pathlib import Path

import pytest

from mamba_train import run_folder


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


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_summary(tmp_path, n_parameters=1, data_folder=tmp_path)
    monkeypatch.setattr(run_folder.os, "replace", lambda *_: None)
    run_folder.write_summary(tmp_path, n_parameters=2, data_folder=tmp_path)  # killed before its last moment
    assert run_folder.read_summary(tmp_path)["n_parameters"] == 1
