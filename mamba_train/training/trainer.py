"""The training loop: typed state, one step function, hooks for everything else.

Which tokens are in a step is a function of the data order and the position; what the devices do
with them is the engine's matter. The loop connects the two and counts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mamba_train.config import Config
from mamba_train.data.batches import Batch
from mamba_train.data.loader import BatchLoader
from mamba_train.data.position import state_of
from mamba_train.data.stream_loader import StreamLoader
from mamba_train.data.streams import Source, StreamSource
from mamba_train.monitor.event_log import EventLog
from mamba_train.monitor.jsonl import finite
from mamba_train.monitor.throughput import Throughput
from mamba_train.parallel.engine import Engine
from mamba_train.training.events import record_skip
from mamba_train.training.guard import Decision, Guard
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.preemption import Stopped, StopRequest
from mamba_train.training.schedule import learning_rate
from mamba_train.training.state import TrainState
from mamba_train.training.stragglers import Stragglers

LN_2 = math.log(2)
DEFAULT_GPU_WORKERS = 2


def summed_loss(engine: Engine, batch: Batch) -> Tensor:
    """The loss of a batch in nats, summed over its targets: a scalar in fp32 on the engine's device."""
    batch = batch.to(engine.device)
    with engine.compute():
        return engine.model(batch.inputs, batch.targets, documents_read(batch))


def documents_read(batch: Batch) -> Tensor | None:
    """The document of each token that the model reads, (rows, length)."""
    return None if batch.seq_idx is None else batch.seq_idx[:, :-1]


def make_loader(config: Config, engine: Engine, source: Source) -> BatchLoader:
    """The loader of this rank."""
    on_gpu = engine.device.type == "cuda"
    workers = config.data.workers
    return (StreamLoader if isinstance(source, StreamSource) else BatchLoader)(
        source,
        engine.rank,
        engine.world_size,
        config.training.micro_batch_size,
        workers=workers if workers is not None else DEFAULT_GPU_WORKERS * on_gpu,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=on_gpu,
    )


class StopInsideHook(Exception):
    """All ranks have agreed to stop while a hook was at work."""


class Trainer:
    """Drives `engine` over `source` from `state` to `config.training.total_steps`."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        source: Source,
        state: TrainState,
        hooks: Sequence[Hook],
        stop: StopRequest | None = None,
        events: EventLog | None = None,
        loader: BatchLoader | None = None,
    ) -> None:
        """loader: one that may have begun to read already; null: a new one."""
        self.config = config
        self.engine = engine
        self.source = source
        self.state = state
        self.hooks = hooks
        self.loader = loader or make_loader(config, engine, source)
        self.guard = Guard(config.guard, config.optim.max_grad_norm, state.guard)
        self.throughput = Throughput(config.training.total_steps)
        self.stop = stop or StopRequest()
        self.events = events or EventLog()
        self.stragglers = Stragglers(config.watchdog, engine, self.events)
        self._all_stop = False  # agreed by all ranks
        self._step_seconds = 0.0
        # Set by a signal handler, on any rank. All ranks raise at the end of the step that they next begin together,
        # and between steps only: Python drops what is raised inside a finaliser.
        self.interrupted = False
        self._stops = False
        self.data_ended = False  # a stream that does not repeat is read to its end
        self.last_batch: Batch | None = None

    def run(self) -> None:
        """Train to the last step, or until asked to stop: then save and raise Stopped.

        On an error the hooks are closed and the error goes on.
        """
        failed = True
        try:
            self.loader.begin(self.state.samples)
            for hook in self.hooks:
                hook.on_start(self)
            if self.state.pending_metrics is not None:
                self._run_hooks(self.state.pending_metrics)
            while not self.finished and (metrics := self._step()) is not None:
                self._run_hooks(metrics)
                if self._stops:
                    raise KeyboardInterrupt
                if self._all_stop and not self.finished:
                    self._stop_here()
            for hook in self.hooks:
                hook.on_end(self)
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            self.loader.close()
            for hook in self.hooks:
                hook.close(failed)

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.training.total_steps

    def check_stop(self) -> None:
        """For work between two steps that takes long: raise StopInsideHook if any rank was asked to stop.

        Every rank must call it equally often. What the hook has begun is done again after the restart.
        """
        request = torch.tensor(float(self._wants_stop()), device=self.engine.device)
        if self.engine.sum_over_ranks(request).item() > 0:
            raise StopInsideHook

    def _run_hooks(self, metrics: Metrics) -> None:
        """All that happens after a step; what a stop leaves undone is done after the restart, from the state."""
        self.state.pending_metrics = None
        try:
            for hook in self.hooks:
                hook.on_step(self, metrics)
        except StopInsideHook:
            self.state.pending_metrics = finite(metrics)
            self._stop_here()

    def _stop_here(self) -> NoReturn:
        for hook in self.hooks:
            hook.on_stop(self)
        reason = self.stop.reason or "another rank was asked to stop"
        raise Stopped(f"stopped after step {self.state.step}, which is saved ({reason})")

    def _wants_stop(self) -> bool:
        return self.stop.requested(self._step_seconds, self.state.save_seconds or 0.0)

    def _to_device(self, values: Tensor) -> Tensor:
        """A copy that the host does not wait for."""
        on_gpu = self.engine.device.type == "cuda"
        return (values.pin_memory() if on_gpu else values).to(self.engine.device, non_blocking=True)

    def data_state(self) -> dict[str, Any]:
        """Of the data, for a checkpoint; every rank must call it at the same step."""
        self.loader.gather(self.engine.ranks.sum)
        return state_of(self.source, self.state.samples)

    def _step(self) -> Metrics | None:
        """One global step: all micro-batches of this rank, then the update. None: there is nothing left to read."""
        self.throughput.start()
        self.stragglers.begin()
        state, training = self.state, self.config.training
        batches = self.loader.step(state.samples)
        counts = [sum(batch.n_targets for batch in batches), int(self.interrupted), *self.loader.counts]
        summed = self.engine.sum_over_ranks(self._to_device(torch.tensor(counts)))
        # On its way to the host before the passes are: a transfer behind the update would wait for the update.
        on_host = summed.to("cpu", non_blocking=True)
        if self.loader.finite and not summed[0]:
            self.data_ended = True
            return None
        n_targets = summed[0].clamp(min=1)  # a batch without a single target has the loss 0
        loss = torch.zeros((), device=self.engine.device)
        for batch in self.engine.micro_batches(batches):
            # Divided by the count of all ranks: the mean over the global batch, however it is split.
            batch = batch.to(self.engine.device)
            loss += self.engine.accumulate(batch.inputs, batch.targets, documents_read(batch), n_targets)

        self.guard.begin([self.source.mixture.stage_at(state.samples), training.global_batch_size])
        lr = learning_rate(state.step + 1, self.config.optim.lr, self.config.schedule, training.total_steps)
        # The request to stop rides along with the loss: all ranks learn of it in the same step, at no cost.
        times = self.stragglers.own(state.step + 1)
        decision = Decision(self.engine, self.guard, loss, self._wants_stop(), times)
        result = self.engine.step(lr, decision)
        self._all_stop = decision.n_requests > 0
        if decision.cause is not None:
            record_skip(self, decision, result)
        self.guard.note(decision.loss, decision.grad_norm, decision.cause)
        self.stragglers.add(self.loader.wait_seconds, decision.wait_seconds)
        targets, n_interrupted, n_bytes, *of_stream = on_host.tolist()  # there since the decision, which came later
        self._stops = bool(n_interrupted)
        bytes_per_target = n_bytes / max(1, targets) or self.source.bytes_per_target(state.samples)
        bits_per_byte = decision.loss / LN_2 / bytes_per_target
        state.step += 1
        state.samples += training.global_batch_size
        state.tokens += self.tokens_per_step
        self.last_batch = batches[0]
        timing = self.throughput.step(state.step, self.tokens_per_step)
        self._step_seconds = timing.step_seconds
        self.stop.first_step_done()
        return {
            "step": state.step,
            "tokens": state.tokens,
            "samples": state.samples,
            "loss": decision.loss,
            "bits_per_byte": bits_per_byte,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "skipped": result.skipped,
            **{f"grad_norm/{part}": norm for part, norm in result.layer_grad_norms.items()},
            "step_seconds": timing.step_seconds,
            "tokens_per_second": timing.tokens_per_second,
            "eta_seconds": timing.eta_seconds,
            "data_wait_seconds": self.loader.wait_seconds,
            **self._stream_counts(*of_stream),
            **self.stragglers.compare(state.step, decision.others),
            **self._epochs(),
        }

    def _stream_counts(self, n_left_out: int, n_repeated: int, *pieces_read: int) -> Metrics:
        """What went wrong while the tokens of this step were read, and how far the lanes are, on all ranks."""
        if not isinstance(self.source, StreamSource):
            return {}
        counts = {"data/left_out_documents": n_left_out, "data/repeated_requests": n_repeated}
        return {**counts, **_named_epochs(self.source.epochs_of(pieces_read))}

    def _epochs(self) -> Metrics:
        """How many times each source of the data has been read."""
        return _named_epochs(self.source.epochs(self.state.samples))


def _named_epochs(epochs: Mapping[str, float]) -> Metrics:
    return {f"epochs/{name}" if name else "epochs": value for name, value in epochs.items()}
