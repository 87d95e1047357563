"""What the config leaves to the size of the model and the memory of a GPU.

`engine=auto`: one device, DDP or FSDP2. `engine.recompute=auto`: as few layers as fit compute their scan again.
`engine.reshard_after_forward=null`: FSDP2 keeps gathered weights for the backward pass where there is room for them.
`engine.cuda_graphs=null`: FSDP2 records its passes where that is known to change no bit of a run.
"""

import bisect
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_train.config import Config, EngineConfig, EngineKind, MixerKind, Recompute, layer_mixers
from mamba_train.data.tokenizer import load_tokenizer
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.memory import GIB, OVERHEAD_BYTES, fits, memory_per_device
from mamba_train.parallel.native import choose_device
from mamba_train.ranks import Ranks

USED = 0.95  # of a GPU: an estimate must not end a run that would go on with less


def resolve_auto(config: Config, ranks: Ranks, log: Callable[[str], None]) -> EngineConfig:
    """The engine's config with nothing left to choose; the same on all ranks, and the log says why."""
    engine = config.engine
    if engine.name is EngineKind.auto:

        def choose() -> list[str]:
            name, reason = choose_engine(config, ranks.world_size, _device_bytes(config))
            return [name.value, reason]

        name, reason = ranks.first(choose)
        log(f"engine=auto: {name}, {reason}")
        engine = dataclasses.replace(engine, name=EngineKind(name))
    chosen = dataclasses.replace(config, engine=engine)
    if engine.recompute is Recompute.auto:
        layers = ranks.first(lambda: layers_to_recompute(chosen, ranks.world_size, _device_bytes(config)))
        if layers:
            log(f"engine.recompute=auto: {layers} layers compute their scan again, so that a step fits")
        chosen.engine = with_recompute(engine, layers)
    if engine.name is EngineKind.fsdp and engine.reshard_after_forward is None:
        keeps = ranks.first(lambda: may_keep_gathered(chosen, ranks.world_size, _device_bytes(config)))
        if keeps:
            log("engine.reshard_after_forward=null: gathered weights stay for the backward pass, a step fits with them")
        chosen.engine = dataclasses.replace(chosen.engine, reshard_after_forward=not keeps)
    if engine.cuda_graphs is None and _on_gpu(config) and (reason := no_graphs(chosen, ranks.world_size)):
        log(f"engine.cuda_graphs=null: no graphs, {reason}")
        chosen.engine = dataclasses.replace(chosen.engine, cuda_graphs=False)
    return chosen.engine


def no_graphs(config: Config, world_size: int) -> str:
    """Why FSDP2 records nothing unless it is told to; empty where it records."""
    engine, training = config.engine, config.training
    if engine.name is not EngineKind.fsdp:
        return ""
    if engine.replicas > 1:
        return "which nobody has tried on GPUs with engine.replicas"
    if training.global_batch_size > training.micro_batch_size * world_size and not engine.reduce_each_micro_batch:
        # Between two of them nothing is left but a rank's own part: sums in another order, and no less traffic.
        return "which would sum gradients over the ranks after each micro-batch, not once per step"
    return ""


def may_keep_gathered(config: Config, world_size: int, device_bytes: float | None) -> bool:
    """Whether a step of FSDP2 fits with all weights gathered; device_bytes: what a GPU has, None on the CPU."""
    if device_bytes is None or config.engine.recompute is Recompute.keep_scan:
        return False
    keeping = dataclasses.replace(config.engine, reshard_after_forward=False)
    model = resolve_model_config(config.model, probable_vocab_size(config))
    return fits(dataclasses.replace(config, engine=keeping), model, world_size, USED * device_bytes)


def layers_to_recompute(config: Config, world_size: int, device_bytes: float | None) -> int:
    """The fewest layers with engine.recompute=scan that let a step fit; all layers when nothing does.

    device_bytes: what a GPU has, None on the CPU, where nothing is computed again.
    """
    model = resolve_model_config(config.model, probable_vocab_size(config))
    if device_bytes is None or all(mixer is MixerKind.attention for mixer in layer_mixers(model)):
        return 0
    limit = USED * device_bytes

    def fit(layers: int) -> bool:
        engine = with_recompute(config.engine, layers)
        return fits(dataclasses.replace(config, engine=engine), model, world_size, limit)

    return bisect.bisect_left(range(model.n_layer), True, key=fit)


def with_recompute(engine: EngineConfig, layers: int) -> EngineConfig:
    """The same with engine.recompute=scan in so many layers."""
    if layers == 0:
        return dataclasses.replace(engine, recompute=Recompute.none)
    return dataclasses.replace(engine, recompute=Recompute.scan, recompute_layers=layers)


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


def _on_gpu(config: Config) -> bool:
    return choose_device(config.engine.device, 0).type == "cuda"


def _device_bytes(config: Config) -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if _on_gpu(config) else None
