"""`engine=auto`: one device, DDP or FSDP2, from the size of the model and the memory of a GPU."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_train.config import Config, EngineConfig, EngineKind
from mamba_train.data.tokenizer import load_tokenizer
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.memory import GIB, OVERHEAD_BYTES, memory_per_device
from mamba_train.parallel.native import choose_device
from mamba_train.ranks import Ranks


def resolve_auto(config: Config, ranks: Ranks, log: Callable[[str], None]) -> EngineConfig:
    """The engine's config with a name other than auto; the same on all ranks, and the log says why."""
    if config.engine.name is not EngineKind.auto:
        return config.engine

    def choose() -> list[str]:
        name, reason = choose_engine(config, ranks.world_size, _device_bytes(config))
        return [name.value, reason]

    name, reason = ranks.first(choose)
    log(f"engine=auto: {name}, {reason}")
    return dataclasses.replace(config.engine, name=EngineKind(name))


def choose_engine(config: Config, world_size: int, device_bytes: float | None) -> tuple[EngineKind, str]:
    """The engine and the reason; device_bytes: what a GPU has, None on the CPU."""
    if world_size == 1:
        return EngineKind.single, "there is one process"
    if device_bytes is None:
        return EngineKind.ddp, f"there are {world_size} processes on the CPU"
    replicated = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name=EngineKind.ddp))
    model = resolve_model_config(config.model, probable_vocab_size(config))
    needed = sum(memory_per_device(replicated, model, world_size).values()) + OVERHEAD_BYTES
    sizes = f"a whole model needs about {needed / GIB:.1f} of the {device_bytes / GIB:.1f} GiB of a GPU"
    return (EngineKind.ddp if needed <= device_bytes else EngineKind.fsdp), f"{sizes}, and there are {world_size}"


def probable_vocab_size(config: Config) -> int:
    """Of the tokenizer, as far as it can be known before the data is prepared."""
    if config.data.tokenizer and Path(config.data.tokenizer).expanduser().is_file():
        return load_tokenizer(Path(config.data.tokenizer).expanduser()).vocab_size
    return config.model.vocab_size or config.data.vocab_size


def _device_bytes(config: Config) -> int | None:
    device = choose_device(config.engine.device, 0)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
