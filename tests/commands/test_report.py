"""`mamba-train report` on the command line."""

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_train.commands import report

METRICS = '{"step":1,"loss":8.0,"validation/loss":7.0,"validation/bits_per_byte":3.5}\n'


def call(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args(arguments))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "baseline.json").write_text('{"bigram": {"bits_per_byte": 4.25, "nats_per_token": 8.5}}')
    return folder


def test_prints_both_bits_per_byte_and_where_the_files_are(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "folder"
    call(str(run_dir), "--output", str(output))
    printed = capsys.readouterr().out
    assert "validation 3.500 bits per byte (best 3.500 at step 1), bigram model 4.250" in printed
    for name in ("report.html", "report.png"):
        assert str(output / name) in printed
        assert (output / name).stat().st_size > 1000
    assert not (run_dir / "report.html").exists()


def test_a_tilde_that_the_shell_left_is_the_home_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run_dir.parent))
    monkeypatch.chdir(run_dir)
    call("~/run", "--output=~/drawn")
    assert (run_dir.parent / "drawn" / "report.html").is_file()
    assert not (run_dir / "~").exists()


def test_user_mistakes_are_value_errors(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no run at .*nowhere; expected the folder of a run"):
        call(str(tmp_path / "nowhere"))
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        call(str(run_dir), str(tmp_path))
    with pytest.raises(ValueError, match=r"--output .* is a file"):
        call(str(run_dir), "--output", str(run_dir / "metrics.jsonl"))


def test_a_full_disk_leaves_the_report_of_before(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "report.png").write_bytes(b"before")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"--output .*run: cannot be written \(.*No space left on device"):
        call(str(run_dir))
    assert (run_dir / "report.png").read_bytes() == b"before"
    assert not list(run_dir.glob("report.*.tmp"))


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_file_that_cannot_be_read_is_named(run_dir: Path, name: str) -> None:
    config = "data: {source: local, sequence_length: 8}\ntraining: {validation_sequences: 2}\n"
    (run_dir / "config.yaml").write_text(config)
    (run_dir / "summary.json").write_text('{"data_folder": "/no/such"}\n')
    call(str(run_dir))
    (run_dir / name).write_text("garbage: [")
    with pytest.raises(ValueError, match=rf"run/{name} is not (a )?valid (config|JSON)"):
        call(str(run_dir))


@pytest.mark.parametrize(
    "summary",
    [
        "{}",
        '{"data_folder": 3}',
        '{"data_folder": null}',
        '{"data_folder": "/no/such", "n_parameters": "many"}',
        '{"data_folder": "/no/such", "sources": ["/no/such"]}',
        '{"data_folder": "/no/such", "held_out": {"a": 1}}',
    ],
)
def test_a_summary_that_nobody_wrote_so_is_named(run_dir: Path, summary: str) -> None:
    config = "data: {source: local, sequence_length: 8}\ntraining: {validation_sequences: 2}\n"
    (run_dir / "config.yaml").write_text(config)
    (run_dir / "summary.json").write_text(summary)
    with pytest.raises(ValueError, match=r"run/summary.json: not what train.py writes"):
        call(str(run_dir))


def test_a_config_that_was_cut_short_is_named(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("data:\n  source: local\n  sequence_length: 8\n")
    (run_dir / "summary.json").write_text('{"data_folder": "/no/such"}\n')
    with pytest.raises(ValueError, match=r"run/config.yaml is not .* \(there is no training\.validation_sequences\)"):
        call(str(run_dir))


def test_reporting_does_not_import_torch_or_wandb(run_dir: Path) -> None:
    code = """
import argparse, sys
from mamba_train.commands import report
parser = argparse.ArgumentParser()
report.add_arguments(parser)
assert "matplotlib" not in sys.modules
report.run(parser.parse_args([sys.argv[1]]))
assert not {"torch", "wandb", "matplotlib.pyplot"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, capture_output=True, text=True)
