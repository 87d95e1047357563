"""Pick the engine that a config names."""

import os
from collections.abc import Callable
from pathlib import Path

from mamba_train.config import EngineConfig, EngineKind
from mamba_train.parallel.engine import Engine
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.replicated import ReplicatedEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.zero import ZeroEngine
from mamba_train.ranks import Ranks


def build_engine(config: EngineConfig, ranks: Ranks) -> Engine:
    """The engine that `config.name` says; raises ValueError when it cannot run with these processes on this machine."""
    if config.name is EngineKind.single and ranks.world_size > 1:
        raise ValueError(
            f"engine=single: it runs one process, and {ranks.world_size} were started; use engine=ddp or engine=fsdp"
        )
    if config.kernel_cache is not None:
        use_kernel_cache(Path(config.kernel_cache).expanduser())
    engines: dict[EngineKind, Callable[[EngineConfig, Ranks], Engine]] = {
        EngineKind.single: NativeEngine,
        EngineKind.ddp: ReplicatedEngine,
        EngineKind.fsdp: ShardedEngine,
        EngineKind.deepspeed: ZeroEngine,
    }
    return engines[config.name](config, ranks)


def use_kernel_cache(folder: Path) -> None:
    """Keep what NVRTC, Triton and the inductor compile under one folder; raises ValueError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"engine.kernel_cache={folder}: it cannot be made ({error.strerror})") from error
    for variable, name in (
        ("MAMBA_TRAIN_KERNEL_CACHE", "mamba_train"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ):
        os.environ[variable] = str(folder.absolute() / name)
