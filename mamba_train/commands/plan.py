"""`mamba-train plan [OVERRIDE ...]`: what a run needs before it is queued; reads no data and needs no GPU."""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_train.composition import compose_config
from mamba_train.config import Config, EngineKind, Recompute

if TYPE_CHECKING:
    from mamba_train.monitor.plan import Plan

GIB = 2**30
DEFAULT_DEVICE = "H100"
DEFAULT_MFU = 0.3
DEVICE_COUNTS = (1, 8, 64, 256)
DEFAULT_GPUS = 8  # whose memory is planned, unless --gpus says another number, when the engine runs on several
# What torch can allocate on them, in GiB.
DEVICE_MEMORY_GIB = {"A100": 79.0, "H100": 79.0, "H200": 139.0, "B200": 178.0}
# Not there yet on the machine where a run is planned.
MAY_BE_MISSING = ("data.path", "data.sources", "data.validation_paths", "data.tokenizer", "init_from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: experiment=mamba_130m_pile")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="how many devices share the work (default: slurm.nodes, else several)"
    )
    parser.add_argument("--device", default=DEFAULT_DEVICE, help=f"whose peak counts (default: {DEFAULT_DEVICE})")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="X", help="of one device (default: the --device's)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="peak of one device, instead of --device")
    parser.add_argument(
        "--mfu", type=float, default=DEFAULT_MFU, help=f"share of the peak that is reached (default: {DEFAULT_MFU})"
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan; raises ValueError, one line, for a wrong config or option, or a run that does not fit."""
    if args.gpus is not None and args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: expected at least 1")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu}: expected more than 0 and at most 1")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < float("inf"):
        raise ValueError(f"--peak-tflops {args.peak_tflops}: expected more than 0")
    if args.gpu_memory_gib is not None and not args.gpu_memory_gib > 0:
        raise ValueError(f"--gpu-memory-gib {args.gpu_memory_gib}: expected more than 0")
    config = compose_config(args.overrides, may_be_missing=MAY_BE_MISSING)
    import torch  # only now: a mistake above is said at once

    from mamba_train.monitor.flops import datasheet_peak
    from mamba_train.monitor.plan import make_plan
    from mamba_train.parallel import auto

    peak = args.peak_tflops * 1e12 if args.peak_tflops else datasheet_peak(args.device, torch.bfloat16)
    if peak is None:
        raise ValueError(f"--device {args.device}: its peak is not known here; give --peak-tflops")
    device = f"{peak / 1e12:g} TFLOP/s" if args.peak_tflops else f"{args.device} ({peak / 1e12:g} TFLOP/s in bf16)"
    plan = make_plan(config, auto.probable_vocab_size(config))
    n_gpus = 1 if config.engine.name is EngineKind.single else _n_gpus(config, args) or DEFAULT_GPUS
    if n_gpus % config.engine.replicas:
        raise ValueError(f"engine.replicas={config.engine.replicas}: expected a divisor of the {n_gpus} GPUs")
    gpu_bytes = GIB * (args.gpu_memory_gib or DEVICE_MEMORY_GIB.get(args.device.upper(), float("inf")))
    if config.engine.name is EngineKind.auto:
        config.engine.name, reason = auto.choose_engine(config, n_gpus, gpu_bytes)
        print(f"engine=auto: {config.engine.name}, {reason}\n")
    if config.engine.recompute is Recompute.auto:
        config.engine = auto.with_recompute(config.engine, auto.layers_to_recompute(config, n_gpus, gpu_bytes))
    if config.engine.name is EngineKind.fsdp and config.engine.reshard_after_forward is None:
        config.engine.reshard_after_forward = not auto.may_keep_gathered(config, n_gpus, gpu_bytes)
    memory = _memory(plan, config, n_gpus, gpu_bytes)
    for section in (_model(plan), memory, _disk(plan, config), _time(plan, config, peak, device, args)):
        print("\n".join(section) + "\n")
    _check_fits(plan, config, n_gpus, gpu_bytes)


def _model(plan: "Plan") -> list[str]:
    flops = dataclasses.asdict(plan.flops)
    return [
        f"{plan.model.name}: {plan.n_parameters:,} parameters",
        *(_row(name, f"{n:,}", n / plan.n_parameters) for name, n in plan.parameters.items()),
        "",
        f"FLOPs per token: {plan.flops.forward:,.0f} forward, {plan.flops.training:,.0f} with the backward; forward:",
        *(_row(name, f"{n:,.0f}", n / plan.flops.forward) for name, n in flops.items() if n),
    ]


def _memory(plan: "Plan", config: Config, n_gpus: int, gpu_bytes: float) -> list[str]:
    from mamba_train.parallel.memory import OVERHEAD_BYTES, memory_per_device

    memory = memory_per_device(config, plan.model, n_gpus)
    total = sum(memory.values())
    batch, length = config.training.micro_batch_size, config.data.sequence_length
    layers = f" in {config.engine.recompute_layers} layers" if config.engine.recompute_layers else ""
    share = f", {total / gpu_bytes:.0%} of it" if gpu_bytes < float("inf") else ""
    return [
        f"memory of each of {n_gpus} device{'s' if n_gpus > 1 else ''}, engine.name={config.engine.name}, "
        f"micro-batches of {batch} x {length:,} tokens, engine.recompute={config.engine.recompute}{layers}: "
        f"{_size(total)}{share}",
        *(_row(name, _size(size), size / total) for name, size in memory.items()),
        f"  besides about {_size(OVERHEAD_BYTES)} for the CUDA context, NCCL and fragments",
    ]


def _check_fits(plan: "Plan", config: Config, n_gpus: int, gpu_bytes: float) -> None:
    from mamba_train.parallel.memory import OVERHEAD_BYTES, fits, memory_per_device, remedy

    if fits(config, plan.model, n_gpus, gpu_bytes):
        return
    needed = sum(memory_per_device(config, plan.model, n_gpus).values()) + OVERHEAD_BYTES
    change = remedy(config, plan.model, n_gpus, gpu_bytes)
    advice = f"it fits with {change}" if change else "use more GPUs and engine=fsdp, or GPUs with more memory"
    raise ValueError(
        f"engine.name={config.engine.name}: the run needs {needed / GIB:.1f} GiB on each of {n_gpus} devices, which "
        f"have {gpu_bytes / GIB:.1f} GiB; {advice}"
    )


def _disk(plan: "Plan", config: Config) -> list[str]:
    needed = plan.checkpoint_bytes * plan.kept_checkpoints + config.checkpoint.reserve_gib * GIB
    folder = Path(config.run_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    verdict = (
        "enough" if free >= needed else "NOT enough: see checkpoint.keep_last, checkpoint.permanent_interval_steps"
    )
    return [
        f"checkpoints: {_size(plan.checkpoint_bytes)} each, up to {plan.kept_checkpoints} at once "
        f"(one of them being written), with the reserve {needed / GIB:.1f} GiB",
        f"  {free / GIB:.1f} GiB free at {folder}: {verdict}",
    ]


def _time(plan: "Plan", config: Config, peak: float, device: str, args: argparse.Namespace) -> list[str]:
    hours = plan.device_hours(peak, args.mfu)
    n_gpus = _n_gpus(config, args)
    counts = (n_gpus,) if n_gpus else DEVICE_COUNTS
    return [
        f"training: {plan.total_steps:,} steps of {plan.tokens_per_step:,} tokens are {_tokens(plan.total_tokens)} "
        f"and {plan.training_flops:.2e} FLOPs",
        f"  at {args.mfu:.0%} MFU of {device}: {_device_time(hours)}",
        *(f"  {count:>5} GPU{'s' if count > 1 else ' '} {_duration(hours / count):>14}" for count in counts),
        *(_refused(config, n_gpus) if n_gpus else ()),
    ]


def _n_gpus(config: Config, args: argparse.Namespace) -> int | None:
    """What the command line says; None where it leaves that open."""
    if args.gpus is not None:
        return int(args.gpus)
    return None if config.slurm.nodes is None else config.slurm.nodes * max(1, config.slurm.gpus_per_node)


def _refused(config: Config, n_gpus: int) -> list[str]:
    """What would be refused at the start: say it now."""
    found = []
    if n_gpus > 1 and config.engine.name == "single":
        found.append(f"  engine.name=single trains on one GPU: choose engine=auto, ddp or fsdp for {n_gpus}")
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % (n_gpus * micro):
        found.append(
            f"  training.global_batch_size={batch} cannot be split over {n_gpus} GPUs in micro-batches of {micro}: "
            "make it a multiple of both, or lower training.micro_batch_size"
        )
    return found


def _size(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:,.1f} MiB"


def _tokens(count: int) -> str:
    return f"{count / 1e9:,.3g} billion tokens" if count >= 1e9 else f"{count:,} tokens"


def _device_time(hours: float) -> str:
    if hours < 0.1:
        return f"{hours * 3600:.2g} GPU-seconds"
    return f"{hours:{',.0f' if hours >= 10 else '.2g'}} GPU-hours"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def _row(name: str, figure: str, share: float) -> str:
    return f"  {name:<40} {figure:>18} {share:>7.1%}"
