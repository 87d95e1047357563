"""The files of a run folder that are neither checkpoints nor metrics."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

CONFIG = "config.yaml"  # the composed config
SUMMARY = "summary.json"  # what the commands need to know: see `write_summary`
BASELINE = "baseline.json"  # the bigram model on the same tokens
SAMPLE = "sample.txt"  # text that the model wrote
EVALUATION = "evaluation"  # a folder: what evaluations found
SAMPLES = "samples"  # a folder: text written at each checkpoint
TOKENIZER = "tokenizer.json"  # a copy, so that the run can be used without its data
SLURM = "slurm"  # jobs: logs, submissions, history
LOCK = ".lock"  # held by the process that trains here


def user_path(text: str) -> Path:
    """A path as the command line has it: of `--output=~/x` the shell leaves the `~`."""
    return Path(text).expanduser()


def lock(run_dir: Path, patience_seconds: float = 0.0) -> TextIO:
    """Claim the folder for this process until the returned file is closed or the process ends, however it ends.

    Two runs in one folder would cut each other's metrics and delete each other's checkpoints.
    Raises ValueError when another process still has it after `patience_seconds`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+")
    end = time.monotonic() + patience_seconds
    while not (free := _try_lock(file)) and time.monotonic() < end:
        time.sleep(0.5)
    if not free:
        file.seek(0)
        raise ValueError(
            f"run_dir={run_dir}: process {file.read().strip() or 'unknown'} is training there; "
            "wait for it, or use another run_dir"
        )
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")  # a disk may be that of many machines
    file.flush()
    return file


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a filesystem without locks
    return True


def holds_run(run_dir: Path) -> bool:
    """Whether train.py has worked in this folder before."""
    return (run_dir / CONFIG).exists()


def write_summary(
    run_dir: Path,
    *,
    n_parameters: int,
    data_folder: Path,
    sources: Mapping[str, Path] | None = None,
    held_out: Mapping[str, Path] | None = None,
) -> None:
    """Record the size of the model and where the prepared data lies.

    data_folder: the only folder, or one of several, which are `sources` (data.sources) and `held_out`
    (data.validation_paths).
    """

    def resolved(folders: Mapping[str, Path] | None) -> dict[str, str]:
        return {name: str(folder.resolve()) for name, folder in (folders or {}).items()}

    summary = {
        "n_parameters": n_parameters,
        "data_folder": str(data_folder.resolve()),
        "sources": resolved(sources),
        "held_out": resolved(held_out),
    }
    replace(run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file that may be there: a reader, and whoever comes after a kill or on a full disk, finds one of both."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two reports of a run may write its baseline at once
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error  # that of a full disk names no file


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `write_summary` wrote; raises ValueError when `run_dir` is not the folder of a run."""
    path = run_dir / SUMMARY
    if not path.is_file():
        raise ValueError(f"{run_dir}: not the folder of a run (there is no {SUMMARY}); give a run_dir of train.py")
    summary = read_json(path)
    several = [summary.get(key, {}) for key in ("sources", "held_out")]
    places = [{"": summary.get("data_folder")}, *several]
    as_written = all(isinstance(named, dict) and all(isinstance(p, str) for p in named.values()) for named in places)
    if not as_written or not isinstance(summary.get("n_parameters", 0), int):
        raise ValueError(f"{path}: not what train.py writes; run train.py again to renew it")
    return summary


def read_config(path: Path, *keys: str) -> DictConfig:
    """A config.yaml as train.py writes it; raises ValueError, which names the file, for anything else.

    keys: those that the caller reads; a file that was cut short is valid YAML, too.
    """
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # OmegaConf lets the errors of its YAML parser through
        raise ValueError(f"{path} is not a valid config ({' '.join(str(error).split())})") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path} is not a valid config (it has no keys)")
    for key in keys:
        if OmegaConf.select(content, key) is None:
            raise ValueError(f"{path} is not a valid config (there is no {key})")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError, which names the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it or write it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content
