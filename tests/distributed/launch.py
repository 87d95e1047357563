"""Runs of several processes on the CPU, by torchrun as a user starts it, and what they leave behind."""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import REPOSITORY, TINY_RUN, environment

DRIVER = Path(__file__).with_name("driver.py")
# Below those that Linux hands out itself, of which any process may get one in the seconds until torchrun listens; those
# from 10,000 on are the daemons' and jobs' of tests/slurm.
PORTS = range(3000, 10000)
_numbers = itertools.count(os.getpid() * 97)  # test processes beside each other have neighbouring numbers


@dataclass(frozen=True)
class Topology:
    """How many processes, and the overrides that choose the engine; 0 processes: without torchrun."""

    processes: int
    overrides: tuple[str, ...]


TOPOLOGIES = {
    "one": Topology(0, ("engine=single",)),
    "ddp x 2": Topology(2, ("engine=ddp",)),
    "fsdp x 2": Topology(2, ("engine=fsdp",)),
    "fsdp x 4": Topology(4, ("engine=fsdp",)),
    "hsdp 2 x 2": Topology(4, ("engine=fsdp", "engine.replicas=2")),
    "zero-1 x 2": Topology(2, ("engine=deepspeed", "engine.zero_stage=1")),
    "zero-2 x 2": Topology(2, ("engine=deepspeed", "engine.zero_stage=2")),
    "zero-2 x 4": Topology(4, ("engine=deepspeed", "engine.zero_stage=2")),
    "zero-3 x 2": Topology(2, ("engine=deepspeed", "engine.zero_stage=3")),
}


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command line for a number of processes on this machine; 0: plain Python."""
    if processes == 0:
        return [sys.executable, *arguments]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=localhost",
    ]
    return [*launcher, f"--master-port={free_port()}", *arguments]


def free_port() -> int:
    """A port that nobody listens at, and that nobody else will choose before it is used."""
    for number in _numbers:
        port = PORTS[number % len(PORTS)]
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("localhost", port))
            return port
    raise AssertionError("there is always a next number")


def overrides(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """The overrides of a tiny run of 30 steps, whose global batch can be cut for up to 4 ranks."""
    return [
        "data=local",
        f"data.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}",
        *TINY_RUN,
        "training.micro_batch_size=1",
        "training.global_batch_size=8",
        "training.total_steps=30",
        "training.validation_sequences=7",  # which no number of ranks here divides
        "checkpoint.interval_steps=15",
        "checkpoint.keep_last=9",
        "checkpoint.verify_forward=true",
        "engine.device=cpu",
        f"run_dir={run_dir}",
        *more,
    ]


def child_environment(**more: str) -> dict[str, str]:
    places = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**environment(), "PYTHONPATH": os.pathsep.join(places), **more}


def drive(
    topology: Topology, corpus: Path, run_dir: Path, *more: str, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Train with driver.py to the end; what it noted is in `notes`."""
    command = torchrun(
        topology.processes, str(DRIVER), *options, *overrides(corpus, run_dir, *topology.overrides, *more)
    )
    return subprocess.run(
        command, cwd=corpus.parent, env=child_environment(), capture_output=True, text=True, timeout=300
    )


def notes(run_dir: Path) -> list[dict[str, Any]]:
    """What each rank of the last `drive` noted, by rank."""
    files = sorted(run_dir.glob("notes_*.json"))
    return [json.loads(file.read_text()) for file in files]


class SharedRuns:
    """Runs that several tests look at, each made once, also when the tests are spread over processes."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self._folder, self._corpus = folder, corpus

    def get(self, name: str, *more: str) -> Path:
        """The run folder of a finished run of 30 steps with `TOPOLOGIES[name]`; more: overrides, always the same."""
        run_dir = self._folder / name.replace(" ", "")
        with (self._folder / f"{run_dir.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (run_dir / "finished").exists():
                result = drive(TOPOLOGIES[name], self._corpus, run_dir, *more)
                assert result.returncode == 0, result.stderr[-4000:]
                (run_dir / "finished").touch()
        return run_dir


def losses(run_dir: Path) -> list[float]:
    """The loss of each step."""
    return metric(run_dir, "loss")


def metric(run_dir: Path, key: str) -> list[float]:
    """A figure of each step that has it."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def kill(pids: Sequence[int]) -> None:
    """`kill -9`, without complaint about those that are gone."""
    for pid in pids:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
