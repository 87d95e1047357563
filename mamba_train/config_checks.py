"""Checks of a composed config that types cannot express; all run before torch is imported."""

import importlib.util
import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import is_dataclass
from pathlib import Path

from mamba_train.config import (
    Config,
    ContainerKind,
    EngineKind,
    EvaluationConfig,
    MixerKind,
    ModelConfig,
    Precision,
    Recompute,
    SlurmConfig,
    layer_mixers,
)
from mamba_train.config_data import DataSource
from mamba_train.config_data_checks import LONGEST_SECONDS, Problem, data_problems
from mamba_train.ranks import launch

# A digit too many would otherwise be an error of torch's, or fill the memory here with a list of layers.
LARGEST_NUMBER = 2**63 - 1
LARGEST_SIZE = 2**31 - 1
SIZES = (
    "model.vocab_size data.vocab_size data.sequence_length data.lanes evaluation.batch_size "
    "training.global_batch_size training.micro_batch_size"
)
LARGEST = {"model.n_layer": 10_000} | dict.fromkeys(SIZES.split(), LARGEST_SIZE)
LARGEST |= {f"model.{name}": 1_000_000 for name in ("d_model", "d_intermediate", "d_state", "d_conv", "expand")}


def check_config(config: Config, ignore: Collection[str] = ()) -> None:
    """Raise ValueError for the first value that cannot work, naming its key and what is accepted.

    ignore: keys, with all below them, that nobody will read this time.
    """
    for key, value, problem in _problems(config):
        if not any(key == name or key.startswith(f"{name}.") for name in ignore):
            raise ValueError(f"{key}={value}: {problem}")


def _problems(config: Config) -> Iterable[Problem]:
    yield from _ranges(config)
    yield from _model(config)
    yield from data_problems(config)
    yield from _training(config)
    yield from _evaluation(config.evaluation)
    yield from _engine(config)
    yield from _slurm(config.slurm)
    if not 0 <= config.seed < 2**63:
        yield "seed", config.seed, "expected 0 to 2^63 - 1"
    yield from _init_from(config)


def _ranges(config: Config) -> Iterable[Problem]:
    """Plain intervals, one line each; NaN and infinities are in none of them."""
    for key, largest in LARGEST.items():
        value = _get(config, key)
        if value is not None and value > largest:
            yield key, value, f"expected at most {largest:,}"
    for section, settings in vars(config).items():
        for name, value in vars(settings).items() if is_dataclass(settings) else ():
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{section}.{name}", value, "expected a finite number"
            if isinstance(value, int) and value > LARGEST_NUMBER:
                yield f"{section}.{name}", value, f"expected at most {LARGEST_NUMBER:,}"
    positive = (
        "model.n_layer model.d_model model.d_state model.d_conv model.expand model.pad_vocab_size_multiple "
        "model.dt_min model.dt_max model.dt_init_floor model.dt_scale model.norm_eps "
        "model.head_dim model.n_groups model.chunk_size model.A_init_min model.A_init_max "
        "data.sequence_length data.prefetch_batches data.task_items data.test_samples evaluation.batch_size "
        "guard.window_steps guard.min_steps guard.deviations guard.loss_rise "
        "watchdog.first_step_seconds watchdog.step_seconds watchdog.between_steps_seconds watchdog.heartbeat_seconds "
        "alerts.timeout_seconds "
        "optim.lr optim.eps optim.max_grad_norm "
        "logging.progress_interval_steps checkpoint.interval_steps checkpoint.keep_last engine.replicas "
        "training.total_steps training.global_batch_size training.micro_batch_size "
        "training.validation_interval_steps training.validation_sequences slurm.max_stalled_starts"
    )
    for key in positive.split():
        value = _get(config, key)
        if not value > 0:
            yield key, value, "expected more than 0"
    not_negative = (
        "model.d_intermediate model.attention_d_conv "
        "guard.rollback_after guard.max_rollbacks watchdog.straggler_interval_steps "
        "evaluation.interval_steps evaluation.sample_tokens optim.weight_decay schedule.warmup_steps "
        "logging.ssm_health_interval_steps checkpoint.reserve_gib "
        "slurm.gpus_per_node slurm.signal_seconds"
    )
    for key in not_negative.split():
        value = _get(config, key)
        if value < 0:
            yield key, value, "expected 0 or more"
    for key in ("first_step", "step", "data", "between_steps", "heartbeat"):
        seconds = getattr(config.watchdog, f"{key}_seconds")
        if seconds is not None and seconds > LONGEST_SECONDS:
            yield f"watchdog.{key}_seconds", seconds, f"expected at most {LONGEST_SECONDS:,} (a year)"
    for key in ("guard.norm_ratio", "watchdog.straggler_ratio"):
        value = _get(config, key)
        if not value > 1:
            yield key, value, "expected more than 1"
    for key in ("optim.beta1", "optim.beta2"):
        value = _get(config, key)
        if not 0 <= value < 1:
            yield key, value, "expected at least 0 and less than 1"
    for key in ("schedule.min_lr_ratio", "schedule.decay_fraction", "data.max_bad_share"):
        value = _get(config, key)
        if not 0 <= value <= 1:
            yield key, value, "expected 0 to 1"
    optional = (
        "model.dt_rank model.vocab_size model.attention_heads model.attention_kv_heads model.attention_head_dim "
        "evaluation.limit checkpoint.permanent_interval_steps slurm.nodes slurm.cpus_per_task watchdog.data_seconds"
    )
    if config.data.workers is not None and config.data.workers < 0:
        yield "data.workers", config.data.workers, "expected null or 0 or more"
    for key in optional.split():
        value = _get(config, key)
        if value is not None and value <= 0:
            yield key, value, "expected null or more than 0"
    for key, name in (("model.name", config.model.name), ("data.name", config.data.name)):
        if not name or "/" in name:
            yield key, repr(name), "expected a name without /: folders are called by it"
    if any(step < 1 for step in config.logging.profile_steps):
        yield "logging.profile_steps", config.logging.profile_steps, "expected steps, which are counted from 1"


def _model(config: Config) -> Iterable[Problem]:
    model = config.model
    if model.dt_min >= model.dt_max:
        yield "model.dt_min", model.dt_min, f"expected less than model.dt_max ({model.dt_max})"
    if model.dt_init_floor > model.dt_min:
        yield "model.dt_init_floor", model.dt_init_floor, f"expected at most model.dt_min ({model.dt_min})"
    if model.A_init_min > model.A_init_max:
        yield "model.A_init_min", model.A_init_min, f"expected at most model.A_init_max ({model.A_init_max})"
    for layer in model.attention_layers:
        if not 0 <= layer < model.n_layer:
            last = model.n_layer - 1
            yield (
                "model.attention_layers",
                model.attention_layers,
                f"expected layers from 0 to {last} (model.n_layer - 1)",
            )
    if len(set(model.attention_layers)) < len(model.attention_layers):
        yield "model.attention_layers", model.attention_layers, "expected each layer once"
    mixers = layer_mixers(model)
    if model.time_invariant and set(mixers) != {MixerKind.mamba1}:
        yield "model.time_invariant", model.time_invariant, "expected false: only layers of model.mixer=mamba1 can be"
    if MixerKind.mamba2 in mixers:
        yield from _mamba2(model)
    if MixerKind.attention in mixers:
        yield from _attention(model)
    trains_tokenizer = config.data.tokenizer is None and config.data.source is not DataSource.shards
    if model.vocab_size is not None and trains_tokenizer and model.vocab_size < config.data.vocab_size:
        yield (
            "model.vocab_size",
            model.vocab_size,
            f"expected null or at least data.vocab_size ({config.data.vocab_size})",
        )


def _mamba2(model: ModelConfig) -> Iterable[Problem]:
    d_inner = model.expand * model.d_model
    if d_inner % model.head_dim:
        product = f"model.expand * model.d_model ({model.expand} * {model.d_model} = {d_inner})"
        yield "model.head_dim", model.head_dim, f"expected a divisor of {product}"
    elif (d_inner // model.head_dim) % model.n_groups:
        heads = f"the number of heads (expand * d_model / head_dim = {d_inner // model.head_dim})"
        yield "model.n_groups", model.n_groups, f"expected a divisor of {heads}"


def _attention(model: ModelConfig) -> Iterable[Problem]:
    heads = model.attention_heads
    if heads is None:
        yield "model.attention_heads", heads, "the model has attention layers; give their number of heads"
        return
    if model.attention_kv_heads is not None and heads % model.attention_kv_heads:
        problem = f"expected a divisor of model.attention_heads ({heads})"
        yield "model.attention_kv_heads", model.attention_kv_heads, problem
    if model.attention_head_dim is None and model.d_model % heads:
        problem = f"expected a divisor of model.d_model ({model.d_model}), or give model.attention_head_dim"
        yield "model.attention_heads", heads, problem
    head_dim = model.attention_head_dim or model.d_model // heads
    rotary_dim = head_dim if model.rotary_dim is None else model.rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        problem = f"expected an even number up to the head's dimension ({head_dim}), or 0 for no rotation"
        yield "model.rotary_dim", model.rotary_dim, problem


def _init_from(config: Config) -> Iterable[Problem]:
    source = config.init_from
    if config.checkpoint.resume and any(Path(config.run_dir, "checkpoints").glob("step_*")):
        return  # a resumed run reads its own checkpoints: what it began with may be gone by now
    if source is None or re.fullmatch(r"[\w.-]+/[\w.-]+", source):  # may be a name on the Hub: looked up later
        return
    if not Path(source).expanduser().is_dir():
        yield "init_from", source, "there is no such folder; expected a run, a checkpoint, weights, or OWNER/NAME"


def _training(config: Config) -> Iterable[Problem]:
    training, schedule = config.training, config.schedule
    if training.global_batch_size % training.micro_batch_size:
        yield (
            "training.global_batch_size",
            training.global_batch_size,
            f"expected a multiple of training.micro_batch_size ({training.micro_batch_size})",
        )
    if schedule.warmup_steps > training.total_steps:
        yield (
            "schedule.warmup_steps",
            schedule.warmup_steps,
            f"expected at most training.total_steps ({training.total_steps})",
        )
    yield from _run_dir(config.run_dir)


def _evaluation(evaluation: EvaluationConfig) -> Iterable[Problem]:
    if evaluation.tasks and importlib.util.find_spec("lm_eval") is None:
        yield "evaluation.tasks", evaluation.tasks, "these need the package lm_eval: pip install -e '.[lm-eval]'"
    if evaluation.interval_steps and not evaluation.tasks:
        yield "evaluation.interval_steps", evaluation.interval_steps, "expected 0 without evaluation.tasks"
    if evaluation.task_folder is not None and not Path(evaluation.task_folder).is_dir():
        yield "evaluation.task_folder", evaluation.task_folder, "there is no such folder"


def _engine(config: Config) -> Iterable[Problem]:
    engine = config.engine
    if engine.reduce_precision is Precision.auto:
        yield "engine.reduce_precision", engine.reduce_precision, "expected fp32 or bf16"
    if engine.zero_stage not in (1, 2, 3):
        yield "engine.zero_stage", engine.zero_stage, "expected 1, 2 or 3"
    if engine.compile and engine.name is EngineKind.deepspeed:
        yield "engine.compile", engine.compile, "expected false with engine=deepspeed; engine=fsdp compiles"
    records = engine.name in (EngineKind.single, EngineKind.ddp, EngineKind.fsdp)
    if engine.cuda_graphs and not records and not (engine.name is EngineKind.auto and launch().world_size == 1):
        yield (
            "engine.cuda_graphs",
            engine.cuda_graphs,
            f"expected null or false with engine={engine.name}; engine=single, ddp and fsdp record",
        )
    if engine.recompute_layers is not None:
        if engine.recompute is not Recompute.scan:
            yield "engine.recompute_layers", engine.recompute_layers, "expected null without engine.recompute=scan"
        elif engine.recompute_layers < 0:
            yield "engine.recompute_layers", engine.recompute_layers, "expected null or 0 or more"
    if engine.replicas != 1 and engine.name is not EngineKind.fsdp:
        yield "engine.replicas", engine.replicas, f"expected 1 with engine={engine.name}; engine=fsdp has replicas"
    may_be_fsdp = engine.name in (EngineKind.fsdp, EngineKind.auto)
    if may_be_fsdp and engine.recompute is Recompute.keep_scan and engine.reshard_after_forward is False:
        # torch counts the operations of the forward pass, and a pass that finds its weights gathered has fewer.
        problem = "expected null or true with engine.recompute=keep_scan, or engine.recompute=layer"
        yield "engine.reshard_after_forward", engine.reshard_after_forward, problem
    world_size = launch().world_size
    if world_size > 1 and config.training.global_batch_size % (config.training.micro_batch_size * world_size):
        product = f"training.micro_batch_size * processes ({config.training.micro_batch_size} * {world_size})"
        yield "training.global_batch_size", config.training.global_batch_size, f"expected a multiple of {product}"


def _slurm(slurm: SlurmConfig) -> Iterable[Problem]:
    seconds = seconds_of(slurm.time)
    if seconds is None or seconds <= 0:
        yield "slurm.time", slurm.time, "expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
    elif slurm.time.isdecimal() and int(slurm.time) >= 3600:  # 1:00:00 in YAML
        problem = (
            "these are minutes; write so long a time as DAYS-HOURS:MINUTES:SECONDS, "
            "and in a YAML file in quotes, as it reads 24:00:00 as a number of seconds"
        )
        yield "slurm.time", slurm.time, problem
    elif slurm.signal_seconds >= seconds:
        yield "slurm.signal_seconds", slurm.signal_seconds, f"expected less than slurm.time ({slurm.time})"
    for name, value in vars(slurm).items():  # what goes into lines of the sbatch file
        texts = value if name in ("sbatch", "container_mounts") else [value]
        if any(isinstance(text, str) and not text.isprintable() for text in texts):
            yield f"slurm.{name}", repr(value), "expected one line of text"
    for entry in slurm.environment:
        if not re.match(r"[A-Za-z_]\w*=", entry):
            yield "slurm.environment", slurm.environment, "expected entries of the form NAME=VALUE"
    for option in slurm.sbatch:
        if not re.match(r"-\S", option):
            yield "slurm.sbatch", slurm.sbatch, "expected options of sbatch, such as --mail-type=END"
    has_image = slurm.container_image is not None
    if has_image != (slurm.container is not ContainerKind.none):
        yield "slurm.container_image", slurm.container_image, "slurm.container and slurm.container_image go together"


def seconds_of(time_limit: str) -> int | None:
    """Seconds of a time limit as SLURM writes them; None for what it would not take."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    # Without days: minutes, minutes:seconds, hours:minutes:seconds.
    units = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _run_dir(run_dir: str) -> Iterable[Problem]:
    if not run_dir:
        yield "run_dir", repr(run_dir), "expected a folder for this run"
        return
    folder = Path(run_dir).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        yield "run_dir", run_dir, f"expected a folder, {existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield "run_dir", run_dir, f"{existing} is not writable; choose another folder"


def _get(config: Config, key: str) -> float:
    node: object = config
    for part in key.split("."):
        node = getattr(node, part)
    return node  # type: ignore[return-value]
