"""Pick the engine that a config names."""

from collections.abc import Callable

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
    engines: dict[EngineKind, Callable[[EngineConfig, Ranks], Engine]] = {
        EngineKind.single: NativeEngine,
        EngineKind.ddp: ReplicatedEngine,
        EngineKind.fsdp: ShardedEngine,
        EngineKind.deepspeed: ZeroEngine,
    }
    return engines[config.name](config, ranks)
