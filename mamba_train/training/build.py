"""Put a run together from its config: data, engine, resume, audit, hooks."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from omegaconf import OmegaConf

from mamba_train import run_folder
from mamba_train.checkpoint import resume_policy, storage
from mamba_train.checkpoint.layout import checkpoints_dir, step_folders
from mamba_train.config import Config, ProgressMode, data_limit_seconds
from mamba_train.config_data import DataSource
from mamba_train.data import cached_shards
from mamba_train.data.batches import BatchSource, WindowForm
from mamba_train.data.cached_shards import CachedSource
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.data.opening import OpenedData, open_data
from mamba_train.data.position import restore, state_of
from mamba_train.data.stream_opening import AnyOpened, OpenedStream, list_stream, open_stream
from mamba_train.data.streams import Source, StreamSource
from mamba_train.model.language_model import resolve_model_config
from mamba_train.monitor.event_log import EventLog
from mamba_train.monitor.progress import Progress
from mamba_train.parallel.auto import resolve_auto
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine
from mamba_train.ranks import Ranks, join
from mamba_train.training.audit import audit, format_audit
from mamba_train.training.forward_check import check_forward_loss
from mamba_train.training.hook_list import hooks_of
from mamba_train.training.hooks.alerts import Alerts
from mamba_train.training.hooks.base import Hook
from mamba_train.training.hooks.harness import task_manager
from mamba_train.training.hooks.watchdog import WatchdogHook
from mamba_train.training.initial_weights import find_initial_weights, load_initial_weights
from mamba_train.training.preemption import StopRequest
from mamba_train.training.restoring import restore_tensors
from mamba_train.training.state import TrainState
from mamba_train.training.trainer import Trainer, make_loader

LOST_NODE_PATIENCE_SECONDS = 600.0
CODE_FOLDERS = ("kernels", "mamba_train")

Log = Callable[[str], None]


def build_trainer(config: Config, stop: StopRequest | None = None) -> Trainer:
    """Everything up to the first step, the resume included; called by all ranks of the run.

    Raises ValueError for a config, a corpus or a checkpoint that the run cannot go on with; what only some ranks
    find wrong stops all of them.
    """
    ranks = join()
    run_dir = Path(config.run_dir)
    is_first = ranks.rank == 0
    mode = config.logging.progress if is_first else ProgressMode.silent
    progress = Progress(mode, config.training.total_steps, config.logging.progress_interval_steps)
    log: Log = progress.message if is_first else _say_nothing
    ranks.together(lambda: None)  # what a rank with a wrong config answers; without it, others would ask and wait
    config = dataclasses.replace(config, engine=resolve_auto(config, ranks, log))
    # Says at once when this machine cannot run it.
    engine = ranks.together(lambda: build_engine(config.engine, ranks))

    def look_for_weights() -> None:
        resumes = config.checkpoint.resume and bool(step_folders(checkpoints_dir(run_dir)))
        if config.init_from is not None and not resumes:
            find_initial_weights(config.init_from, log)

    ranks.first(look_for_weights)  # before the data is prepared, which may take hours
    data, source = (_stream if config.data.source is DataSource.stream else _shards)(config, ranks, log)
    config = dataclasses.replace(config, model=resolve_model_config(config.model, data.vocab_size))
    shown_config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    fingerprints = {
        "code": _code_fingerprint(),
        "data": _hash("".join(source.fingerprint_of(name) for name in source.names).encode()),
        "validation": _hash("".join(corpus.fingerprint for corpus in data.validation.values()).encode()),
        "config": _hash(json.dumps(shown_config, sort_keys=True).encode()),
    }

    lock = _HoldLock()
    named = [config.init_from, config.data.path, config.data.tokenizer, *config.data.sources.values()]
    named.append(config.evaluation.task_folder)
    needed = [Path.cwd(), data.folder, *data.held_out.values(), *(Path(p).expanduser() for p in named if p)]
    ranks.first(lambda: lock.claim(run_dir, config.checkpoint.resume, needed, log))
    alerts = Alerts(config.alerts, run_dir, log)
    watchdog = WatchdogHook(run_dir, config.watchdog, data_limit_seconds(config), ranks, alerts)
    if ranks.world_size > 1:  # they wait for each other from here on
        watchdog.start()
    events = EventLog(run_dir if is_first else None, log)
    events.listeners.append(lambda event: log(event["text"]))
    found = ranks.first(lambda: _find_checkpoint(run_dir, shown_config, fingerprints, events, log))
    checkpoint = None if found is None else Path(found)
    state = TrainState()
    if checkpoint is not None:
        state = _resume_data(checkpoint, source, config.data.allow_changed, ranks, events, log)
    loader = make_loader(config, engine, source)
    loader.begin(state.samples)  # workers come to their places while the rest starts up
    ranks.together(lambda: engine.prepare(config.model, config.optim, config.seed))
    if checkpoint is not None:
        _resume(checkpoint, engine, state, log)
    elif config.init_from is not None:
        source_of_weights = config.init_from
        ranks.together(lambda: load_initial_weights(source_of_weights, engine, config.model, data.folder, log))
    _describe(config, engine, data, source, log)
    log(format_audit(audit(engine, config.model, fresh=checkpoint is None and config.init_from is None)))
    if state.step >= config.training.total_steps:
        log(f"the run in {run_dir} has already reached step {state.step}; raise training.total_steps to go on")
    ranks.first(lambda: _write_run_files(run_dir, config, data, engine))
    manager = ranks.together(lambda: task_manager(config.evaluation)) if config.evaluation.tasks else None
    hooks = hooks_of(
        config, engine, data, source.form, progress, shown_config, fingerprints, manager, events, alerts, watchdog, log
    )
    return Trainer(config, engine, source, state, [*hooks, lock], stop, events, loader)


def _shards(config: Config, ranks: Ranks, log: Log) -> tuple[OpenedData, BatchSource]:
    """The data of a run that reads shards, which the first rank prepares where they are not there."""
    ranks.first(lambda: _nothing(open_data(config.data, log)))
    # Not hashed by each rank once more: hundreds of them would read all shards.
    unhashed = dataclasses.replace(config.data, check_hashes=False)
    data = ranks.together(lambda: open_data(unhashed, _say_nothing))
    of_first = ranks.first(lambda: _what_is_read(data))
    ranks.together(lambda: _check_same(data, of_first))
    batch_size = config.training.global_batch_size
    return data, BatchSource(data.corpora, batch_size, config.seed, _form(config), data.stages)


def _stream(config: Config, ranks: Ranks, log: Log) -> tuple[OpenedStream, Source]:
    """The data of a run that streams; only the first rank asks what files there are."""
    listed = ranks.first(lambda: list_stream(config.data, log))
    data = ranks.together(lambda: open_stream(config.data, listed))
    if config.data.cache_shards:
        return data, _cached(config, data, ranks, log)
    batch_size, tokenizer = config.training.global_batch_size, data.tokenizer.serialised
    return data, StreamSource(data.files, tokenizer, config.data, batch_size, config.seed, _form(config), data.stages)


def _cached(config: Config, data: OpenedStream, ranks: Ranks, log: Log) -> CachedSource:
    failure = ranks.first(lambda: cached_shards.failure_name(Path(config.run_dir)))

    def begin() -> dict[str, str]:
        folders = cached_shards.begin(config.data, data.tokenizer, failure, log)
        return {name: str(folder) for name, folder in folders.items()}

    folders = {name: Path(folder) for name, folder in ranks.first(begin).items()}
    batch_size = config.training.global_batch_size
    return ranks.together(lambda: CachedSource(folders, failure, batch_size, config.seed, _form(config), data.stages))


def _nothing(result: object) -> None:
    """For work whose result stays on its rank."""


def _what_is_read(data: OpenedData) -> list[list[str]]:
    named = [data.corpora, data.validation]
    return [[f"{name}: {corpus.fingerprint}" for name, corpus in corpora.items()] for corpora in named]


def _check_same(data: OpenedData, of_first: list[list[str]]) -> None:
    """Raise ValueError if this rank's tokens are not those of rank 0, as when each node has its own copy of them."""
    if _what_is_read(data) != of_first:
        raise ValueError(
            f"data.path, data.sources: {data.folder} on {platform.node()} has other tokens than on the node of rank 0; "
            "all nodes need the same"
        )


def _say_nothing(text: str) -> None:
    """The log of all ranks but the first."""


def _form(config: Config) -> WindowForm:
    return WindowForm(
        config.data.sequence_length, config.data.reset_state_at_documents, config.data.mask_loss_at_documents
    )


class _HoldLock(Hook):
    """Keeps the run folder for this run until it is over; rank 0 claims it for all."""

    def __init__(self) -> None:
        self._lock: TextIO | None = None

    def claim(self, run_dir: Path, resume: bool, needed: Sequence[Path], log: Log) -> None:
        self._lock = _claim(run_dir, resume, needed, log)

    def close(self, failed: bool) -> None:
        if self._lock is not None:
            self._lock.close()


def _claim(run_dir: Path, resume: bool, needed: Sequence[Path], log: Log) -> TextIO:
    """Lock the run folder; with checkpoint.resume=false, a new one in the place of an earlier run's.

    needed: places that this run works with, which must not move.
    """
    # When a node is lost, its processes may outlive the job that SLURM has started anew elsewhere.
    patience = LOST_NODE_PATIENCE_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0.0
    lock = run_folder.lock(run_dir, patience)
    if resume or not run_folder.holds_run(run_dir):
        return lock
    root = run_dir.resolve()
    for place in needed:
        # Also by way of the run folder to what lies elsewhere: of such a path a part would move.
        if any(part.resolve() == root for end in (place.absolute(), place.resolve()) for part in (end, *end.parents)):
            lock.close()
            raise ValueError(
                f"run_dir={run_dir}: checkpoint.resume=false would move the earlier run aside, and with it {place}, "
                "which this one needs; choose another run_dir"
            )
    _set_aside(run_dir, log)
    lock.close()
    return run_folder.lock(run_dir)


def _set_aside(run_dir: Path, log: Log) -> None:
    """checkpoint.resume=false starts over without destroying anything."""
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    run_dir.rename(aside)
    log(f"checkpoint.resume=false: the earlier run was moved to {aside}")


def _find_checkpoint(
    run_dir: Path, shown_config: dict[str, Any], fingerprints: dict[str, str], events: EventLog, log: Log
) -> str | None:
    """The newest complete checkpoint, if the table of what may change lets this config use it."""
    path = storage.newest_complete(checkpoints_dir(run_dir), lambda text: events.add("damaged checkpoint", text))
    if path is None:
        if step_folders(checkpoints_dir(run_dir)):
            # Starting at step 0 as if nothing had been there would hide the loss.
            raise ValueError(
                f"run_dir={run_dir}: none of its checkpoints is complete; "
                "restore one, or start over with checkpoint.resume=false (moves the run aside)"
            )
        return None
    checkpoint = storage.read_record(path)
    if "imported_from" in checkpoint.state:
        raise ValueError(
            f"run_dir={run_dir}: it holds imported weights, which no run has trained so far; "
            f"begin a run with them by init_from={run_dir} and another run_dir"
        )
    resume_policy.apply(resume_policy.compare(checkpoint.config, shown_config), log)
    if checkpoint.fingerprints.get("code") != fingerprints["code"]:
        log("the code has changed since the checkpoint: the steps may differ in the last bits")
    if checkpoint.fingerprints.get("validation") != fingerprints["validation"]:
        log("warning: the held-out text has changed since the checkpoint: validation losses do not compare")
    return str(path)


def _resume_data(
    checkpoint: Path, source: Source, allow_changed: bool, ranks: Ranks, events: EventLog, log: Log
) -> TrainState:
    record = storage.read_record(checkpoint)
    state = TrainState.from_json(record.state["train"])
    changed = ranks.together(lambda: restore(source, record.state["data"], state.step, allow_changed))
    if changed:
        names = ", ".join(name for name in changed if name) or "the training text"
        log(f"warning: data.allow_changed=true: the tokens of {names} are others than before step {state.step}")
    if isinstance(source, StreamSource) and (rewritten := source.rewritten):
        others = f" and {len(rewritten) - 1} more have" if len(rewritten) > 1 else " has"
        text = (
            f"warning: {rewritten[0]}{others} the size that the checkpoint knows and a later time: if that is a copy, "
            "nothing is lost; if the text was edited, the tokens from here on are others"
        )
        events.add("files rewritten", text, step=state.step, n_files=len(rewritten))
    return state


def _resume(checkpoint: Path, engine: Engine, state: TrainState, log: Log) -> None:
    record = storage.read_record(checkpoint)
    restore_tensors(checkpoint, engine, log)
    if "forward_loss" in record.state:
        check_forward_loss(engine, record.state["forward_loss"], f"checkpoint {checkpoint}")
    log(f"resuming after step {state.step} ({state.tokens:,} tokens)")


def _describe(config: Config, engine: Engine, data: AnyOpened, source: Source, log: Log) -> None:
    tokens = config.training.global_batch_size * config.data.sequence_length
    log(
        f"{config.model.name}: {_n_parameters(engine):,} parameters on {engine.device}; "
        f"{data.size}, {tokens:,} tokens per step"
    )
    if config.data.mixture:
        for stage in source.mixture.stages:
            shares = ", ".join(f"{name} {float(share):.4%}" for name, share in stage.shares.items())
            log(f"data: from step {stage.from_step}: {shares}")
    size = len(json.dumps(state_of(source, 0)))
    log(f"data: the state in a checkpoint is {size:,} bytes (position, seed, mixture stages, fingerprints, lanes)")
    if not data.validation:
        log("warning: there is no text to validate on; name some by data.validation_paths")


def _write_run_files(run_dir: Path, config: Config, data: AnyOpened, engine: Engine) -> None:
    """What the commands that read a run folder need besides checkpoints and metrics."""
    run_folder.replace(run_dir / run_folder.CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)))
    # With it the run can be moved, sampled and exported without its data.
    run_folder.write_summary(
        run_dir,
        n_parameters=_n_parameters(engine),
        data_folder=data.folder,
        sources=data.folders if config.data.sources and isinstance(data, OpenedData) else {},
        held_out=data.held_out,
    )
    run_folder.replace(run_dir / run_folder.TOKENIZER, (data.folder / TOKENIZER_NAME).read_bytes())


def _n_parameters(engine: Engine) -> int:
    return sum(math.prod(shape) for shape in engine.parameter_shapes().values())


def _code_fingerprint() -> str:
    """Hash of the sources that decide what a step computes."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE_FOLDERS for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
