"""Pick the engine that a config names."""

from mamba_train.config import EngineConfig, EngineKind
from mamba_train.parallel.engine import Engine
from mamba_train.parallel.single import SingleDeviceEngine


def build_engine(config: EngineConfig) -> Engine:
    """The engine that `config.name` says; raises ValueError when it cannot run on this machine."""
    engines = {EngineKind.single: SingleDeviceEngine}
    return engines[config.name](config)
