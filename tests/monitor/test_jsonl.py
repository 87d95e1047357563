"""metrics.jsonl: nothing written is lost, each step stands once, damage is kept aside."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.monitor import jsonl
from mamba_train.monitor.jsonl import JsonlSink, read_metrics

WRITER = """
import sys
from pathlib import Path
from mamba_train.monitor.jsonl import JsonlSink

sink = JsonlSink(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    sink.log({"step": step, "loss": 1.0 / step})
    print(step, flush=True)  # said only after the record is written
"""


def write_steps(run_dir: Path, steps: range) -> None:
    sink = JsonlSink(run_dir)
    for step in steps:
        sink.log({"step": step, "loss": 1.0 / step})
    sink.close()


def steps_in(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_digit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    sink = JsonlSink(run_dir)
    sink.log({"step": 1, "loss": value})
    sink.close()
    (record,) = read_metrics(run_dir)
    assert record["loss"] == value
    assert math.copysign(1, record["loss"]) == math.copysign(1, value)


def test_non_finite_floats_become_null_and_other_types_stay(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "skipped": True, "d": None, "e": 3})
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("null") == 4
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "skipped": True, "d": None, "e": 3}]


def test_a_record_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log({"step": 1})
    assert steps_in(tmp_path) == [1]
    sink.close()


def test_kill_9_loses_no_record_that_log_returned_from(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 500:
            break
    process.send_signal(signal.SIGKILL)
    said = [500, *map(int, process.stdout.read().split("\n")[:-1])][-1]
    assert process.wait() == -signal.SIGKILL
    steps = steps_in(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= said


def test_cut_at_keeps_the_steps_up_to_the_checkpoint_and_moves_the_others(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    sink = JsonlSink(tmp_path)
    cut = sink.cut_at(4)
    assert cut == tmp_path / "metrics.cut-001.jsonl"
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_bytes() + cut.read_bytes() == before
    sink.log({"step": 5, "loss": 0.5})
    sink.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*.tmp"))


def test_later_cuts_count_up_and_leave_earlier_ones_alone(tmp_path: Path) -> None:
    for round_, last in enumerate((3, 2, 1), start=1):
        write_steps(tmp_path, range(last + 1, 6) if round_ > 1 else range(1, 6))
        sink = JsonlSink(tmp_path)
        sink.cut_at(last - 1)
        sink.close()
    names = sorted(path.name for path in tmp_path.glob("metrics.cut-*.jsonl"))
    assert names == ["metrics.cut-001.jsonl", "metrics.cut-002.jsonl", "metrics.cut-003.jsonl"]
    assert [json.loads(line)["step"] for line in (tmp_path / names[0]).read_text().splitlines()] == [3, 4, 5]


def test_cut_at_moves_nothing_when_there_is_nothing_later(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    sink = JsonlSink(tmp_path)
    assert sink.cut_at(3) is None
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step":4,"lo', b"{", b'{"step"', b"\xff\xfe"])
def test_a_torn_last_line_is_moved_aside_with_the_later_ones(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [1, 2, 3]
    sink = JsonlSink(tmp_path)
    cut = sink.cut_at(2)
    sink.log({"step": 3})
    sink.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    assert cut is not None
    assert torn in cut.read_bytes()


def test_a_torn_line_does_not_swallow_the_next_record_without_a_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1}')  # whole but for its end of line
    write_steps(tmp_path, range(2, 4))
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.cut-001.jsonl", "metrics.jsonl"])
def test_a_cut_that_dies_before_a_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_steps(tmp_path, range(1, 8))
    sink = JsonlSink(tmp_path)
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if target.name == name:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(jsonl.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        sink.cut_at(4)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    again = JsonlSink(tmp_path)
    cut = again.cut_at(4)
    again.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert cut is not None
    assert [json.loads(line)["step"] for line in cut.read_text().splitlines()] == [5, 6, 7]


def test_a_full_disk_is_said_once_counted_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    sink = JsonlSink(tmp_path, warnings.append)
    sink.log({"step": 1})
    write = os.write

    def half_then_full(descriptor: int, line: bytes) -> int:
        if len(line) <= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, line[: len(line) - 4])

    monkeypatch.setattr(jsonl.os, "write", half_then_full)
    sink.log({"step": 2})
    sink.log({"step": 3})
    monkeypatch.undo()
    sink.log({"step": 4})
    sink.close()
    assert steps_in(tmp_path) == [1, 4]
    assert sink.dropped == 2
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


def test_a_cut_on_a_full_disk_leaves_the_records_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, range(1, 5))
    sink = JsonlSink(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sink.cut_at(2)
    sink.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metrics.jsonl"),
        (b"", "no complete record"),
        (b'{"step":', "no complete record"),
        (b'{"step":1}\nnonsense\n{"step":2}\n', "line 2 is not a JSON object with a step"),
        (b'{"loss":1}\n', "line 1 is not"),
    ],
)
def test_read_metrics_says_what_is_wrong(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)
