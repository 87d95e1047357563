"""Pick the engine that a config names."""

from mamba_train.config import EngineConfig
from mamba_train.parallel.engine import Engine
from mamba_train.parallel.single import SingleDeviceEngine


def build_engine(config: EngineConfig) -> Engine:
    """The engine `config.name`; raises ValueError for an unknown one."""
    if config.name != "single":
        raise ValueError(f"engine.name={config.name}: expected single")
    return SingleDeviceEngine(config)
