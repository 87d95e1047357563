"""The hooks of a run, from its config, in the order in which they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_train.checkpoint.layout import checkpoints_dir
from mamba_train.config import Config
from mamba_train.config_data import DataSource
from mamba_train.data.batches import WindowForm
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.data.stream_opening import AnyOpened
from mamba_train.data.synthetic import task_corpus
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from mamba_train.data.validation import validation_sets
from mamba_train.monitor.event_log import EventLog
from mamba_train.monitor.flops import flops_per_token, peak_flops
from mamba_train.monitor.progress import Progress
from mamba_train.parallel.engine import Engine
from mamba_train.training.hooks.alerts import Alerts, LifeHook
from mamba_train.training.hooks.base import Hook
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.hooks.harness import HarnessHook
from mamba_train.training.hooks.health import HealthHook
from mamba_train.training.hooks.inspection import MemorySnapshotHook, ProfilerHook
from mamba_train.training.hooks.recording import RecordingHook
from mamba_train.training.hooks.rollback import RollbackHook
from mamba_train.training.hooks.samples import SamplesHook
from mamba_train.training.hooks.synthetic import TaskAccuracyHook, TaskTestHook
from mamba_train.training.hooks.utilisation import UtilisationHook
from mamba_train.training.hooks.validation import HeldOut, ValidationHook
from mamba_train.training.hooks.watchdog import WatchdogHook

Log = Callable[[str], None]


def hooks_of(
    config: Config,
    engine: Engine,
    data: AnyOpened,
    form: WindowForm,
    progress: Progress,
    shown_config: dict[str, Any],
    fingerprints: dict[str, str],
    manager: Any,
    events: EventLog,
    alerts: Alerts,
    watchdog: WatchdogHook,
    log: Log,
) -> list[Hook]:
    """In the order in which they run: those that measure, the record, the checkpoint, and what may fail then."""
    training, run_dir = config.training, Path(config.run_dir)
    length, tokenizer = config.data.sequence_length, load_tokenizer(data.folder / TOKENIZER_NAME)
    domains = validation_sets(data.validation, form, training.validation_sequences)
    if short := sorted(data.validation.keys() - {domain.label for domain in domains}):
        log(f"warning: not validated on, as they have fewer tokens than one window of {length + 1}: {', '.join(short)}")
    held_out = [
        HeldOut(domain.label, list(domain.batches(training.micro_batch_size)), domain.n_bytes(tokenizer))
        for domain in domains
    ]
    checkpointing = CheckpointHook(
        checkpoints_dir(run_dir), config.checkpoint, engine.ranks, shown_config, fingerprints, events
    )
    recording = RecordingHook(run_dir, progress, config.logging, shown_config, events, log)
    logging = config.logging
    inspection: list[Hook] = [ProfilerHook(run_dir, logging.profile_steps, engine.rank, log)]
    if logging.memory_snapshot:
        inspection.append(MemorySnapshotHook(run_dir, engine.rank, engine.device, log))
    task_at_steps, task_at_end = _task_hooks(config, data, log)
    return [
        watchdog,
        *inspection,
        HealthHook(config.model, config.logging.ssm_health_interval_steps),
        ValidationHook(held_out, training.validation_interval_steps),
        *task_at_steps,
        *_evaluation_hooks(config, tokenizer, manager, log),
        UtilisationHook(flops_per_token(config.model, length), peak_flops(engine.device, engine.compute_dtype)),
        checkpointing.hold_up,
        recording,
        checkpointing,
        RollbackHook(run_dir, checkpoints_dir(run_dir), config.guard, recording, checkpointing, log),
        *task_at_end,
        LifeHook(events, alerts),
        watchdog.at_end,
    ]


def _evaluation_hooks(config: Config, tokenizer: TextTokenizer, manager: Any, log: Log) -> list[Hook]:
    evaluation, run_dir = config.evaluation, Path(config.run_dir)
    hooks: list[Hook] = []
    if manager is not None:
        hooks.append(HarnessHook(evaluation, manager, tokenizer, config.data.sequence_length, run_dir, log))
    if config.data.source is not DataSource.synthetic:
        prompts, interval = list(evaluation.sample_prompts), config.checkpoint.interval_steps
        hooks.append(SamplesHook(prompts, evaluation.sample_tokens, interval, tokenizer, run_dir, log))
    return hooks


def _task_hooks(config: Config, data: AnyOpened, log: Log) -> tuple[list[Hook], list[Hook]]:
    """What measures a synthetic task at a step, and what tests it when all is saved."""
    if config.data.source is not DataSource.synthetic:
        return [], []
    length, n_samples = config.data.sequence_length, config.data.test_samples
    trained, *tests = (
        task_corpus(config.data, "test", data.folder, tested) for tested in (length, *config.data.test_lengths)
    )
    at_steps = TaskAccuracyHook(trained, n_samples, config.training.validation_interval_steps)
    return [at_steps], [TaskTestHook(tests, length, n_samples, Path(config.run_dir), log)]
