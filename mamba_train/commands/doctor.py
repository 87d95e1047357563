"""`mamba-train doctor [OVERRIDE ...]`: would this run start here? Under torchrun or srun it looks at all ranks."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_train.composition import compose_config
from mamba_train.config import Config, WandbMode
from mamba_train.config_checks import check_config

if TYPE_CHECKING:
    from mamba_train.parallel.engine import Engine
    from mamba_train.ranks import Ranks

GIB = 2**30
PACKAGES = ("torch", "triton", "cuda-core", "deepspeed", "tokenizers", "safetensors", "hydra-core", "wandb")
# Said at the end, so that the machine is looked at all the same.
MAY_BE_MISSING = ("data.path", "data.tokenizer", "init_from")
# Bytes that each rank sends; large enough for the rate not to depend on it.
BANDWIDTH_BYTES = {"cuda": 2**28, "cpu": 2**24}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: engine=fsdp")


def run(args: argparse.Namespace) -> None:
    """Print one screen about the machine and the job; raises ValueError, one line, when a run would not start."""
    from mamba_train import ranks

    config = compose_config(args.overrides, may_be_missing=MAY_BE_MISSING)
    group = ranks.join()
    # Not print: of several ranks one speaks.
    say: Callable[[str], None] = print if group.rank == 0 else _say_nothing
    problems: list[str] = []
    _versions(say)
    engine = _engine(config, group, say)
    _kernels(engine, say, problems)
    _bandwidth(engine, say)
    group.first(lambda: _disk(config, say, problems))
    group.first(lambda: _wandb(config, say, problems))
    _inputs(config, problems)

    def conclude() -> None:
        if problems:
            raise ValueError(f"doctor: a run would not start: {'; '.join(problems)}")

    group.together(conclude)
    say("a run would start")
    ranks.leave()


def _say_nothing(text: str) -> None:
    """What the other ranks print."""


def _inputs(config: Config, problems: list[str]) -> None:
    """What the run reads must be there on every rank."""
    try:
        check_config(config)
    except ValueError as error:
        problems.append(str(error))


def _versions(say: Callable[[str], None]) -> None:
    import torch

    say(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    say(", ".join(found))
    if torch.cuda.is_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        say(f"CUDA {torch.version.cuda}, NCCL {nccl}, {torch.cuda.device_count()} GPUs:")
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            say(f"  {index}  {of.name}, {of.total_memory / GIB:.0f} GiB, compute capability {of.major}.{of.minor}")
    else:
        say("no CUDA device")


def _engine(config: Config, group: "Ranks", say: Callable[[str], None]) -> "Engine":
    """The engine that a run would have; raises ValueError when it cannot run here."""
    import dataclasses

    from mamba_train.parallel.auto import resolve_auto
    from mamba_train.parallel.build import build_engine

    settings = dataclasses.replace(config, engine=resolve_auto(config, group, say))
    engine = group.together(lambda: build_engine(settings.engine, group))
    dtype = str(engine.compute_dtype).removeprefix("torch.")
    say(f"engine={settings.engine.name}: {engine.world_size} processes, rank 0 on {engine.device}, products in {dtype}")
    return engine


def _kernels(engine: "Engine", say: Callable[[str], None], problems: list[str]) -> None:
    """Every rank tests its own device; rank 0 shows its figures, any rank's failure counts."""
    from mamba_train.monitor.self_test import run_self_tests

    say(f"{'operator':<24} {'computed by':<44} {'largest error':>13}")
    for test in run_self_tests(engine.device, engine.compute_dtype):
        say(f"{test.operator:<24} {test.kernel:<44} {test.error:>13.1e}  {'ok' if test.passed else 'WRONG'}")
        if not test.passed:
            problems.append(f"{test.operator} is wrong on {engine.device} of rank {engine.rank} ({test.worst})")


def _bandwidth(engine: "Engine", say: Callable[[str], None]) -> None:
    """Of an all-reduce over all ranks: bytes that each GPU moves per second, as NCCL's own tests count them."""
    if engine.world_size == 1:
        return
    import torch

    n_bytes = BANDWIDTH_BYTES[engine.device.type]
    values = torch.ones(n_bytes // 4, device=engine.device)
    seconds = []
    for _ in range(6):
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        total = engine.sum_over_ranks(values)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    assert float(total[0]) == engine.world_size, "the all-reduce computed a wrong sum"
    moved = 2 * (engine.world_size - 1) / engine.world_size * n_bytes
    rate = moved / min(seconds[1:]) / 1e9
    say(f"all-reduce of {n_bytes / 2**20:.0f} MiB over {engine.world_size} ranks: {rate:.2f} GB/s")


def _disk(config: Config, say: Callable[[str], None], problems: list[str]) -> None:
    from mamba_train.monitor.plan import make_plan
    from mamba_train.parallel.auto import probable_vocab_size

    plan = make_plan(config, probable_vocab_size(config))
    needed = plan.checkpoint_bytes + config.checkpoint.reserve_gib * GIB
    for key, folder in (("run_dir", config.run_dir), ("data.cache_dir", config.data.cache_dir)):
        path = Path(folder).absolute()
        existing = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        say(f"{key}={folder}: {free / GIB:.1f} GiB free")
        if not os.access(existing, os.W_OK | os.X_OK):
            problems.append(f"{key}={folder}: {existing} is not writable")
        if key == "run_dir" and free < needed:
            problems.append(
                f"{key}={folder}: a checkpoint and the reserve need {needed / GIB:.1f} GiB, {free / GIB:.1f} are free"
            )


def _wandb(config: Config, say: Callable[[str], None], problems: list[str]) -> None:
    from mamba_train.monitor.wandb_sink import resolve_mode

    mode = resolve_mode(config.logging.wandb)
    logged_in = resolve_mode(WandbMode.auto) is WandbMode.online
    say(f"wandb: {mode}{'' if logged_in or mode is not WandbMode.offline else ', not logged in: wandb login'}")
    if config.logging.wandb is WandbMode.online and not logged_in and not os.environ.get("WANDB_MODE"):
        problems.append("logging.wandb=online: wandb has no login; wandb login, or logging.wandb=offline")
    sys.stdout.flush()
