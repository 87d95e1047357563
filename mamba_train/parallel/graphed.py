"""The passes of a micro-batch, and the update, as CUDA graphs: one launch instead of several thousand.

A layer launches about fifty small kernels each way, and Python needs longer to launch them than a GPU needs to compute
them unless the micro-batch is large. The update waits for the host's decision, and every millisecond that Python then
needs the GPU is idle.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mamba_train.ranks import before_leaving

_log = logging.getLogger(__name__)
_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

T = TypeVar("T")

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor]  # inputs, targets, seq_idx, n_targets
Shapes = tuple[torch.Size | None, ...]
Variant = tuple[bool, bool]  # the first of a step's micro-batches, the last


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    arguments: Arguments  # what the graph reads
    loss: Tensor  # what it writes


class GraphedPasses:
    """Calls `passes` (arguments to a detached loss; adds to the gradients) and from the second call on replays it.

    The first call of each shape runs as it is: it compiles what there is to compile. Only one shape is recorded, the
    first that comes twice, because a graph keeps the memory of its activations; others run as they are. The same
    kernels run in the same order either way, so the numbers are the same. `variant` tells apart passes of the same
    shape that do not launch the same; each has a graph, and all of them one memory. While `may_record` is false
    nothing is recorded: a variant's first call would need memory of its own beside the graph of another.
    Once it `has_recorded`, `.grad` of the parameters must stay the same tensors: a graph adds to those that it found;
    where it found none, it makes them anew each time, at the same place.

    NCCL wants all ranks to record a collective, or none. So they must call this with the same shapes in the same order,
    and a graph is kept only if no rank failed: any_rank: whether a flag is true on one of them. undo: called, where a
    recording is given up, before the passes run without.
    """

    def __init__(
        self,
        passes: Callable[..., Tensor],
        any_rank: Callable[[bool], bool] = bool,
        undo: Callable[[], object] = lambda: None,
    ) -> None:
        self._passes, self._any_rank, self._undo = passes, any_rank, undo
        self._seen: set[tuple[Shapes, Variant]] = set()
        self._recorded: Shapes | None = None
        self._recordings: dict[Variant, _Recording | None] = {}
        self.has_recorded = False
        self.may_record = True

    def __call__(self, *arguments: *Arguments, variant: Variant = (True, True)) -> Tensor:
        shapes = tuple(None if argument is None else argument.shape for argument in arguments)
        if (shapes, variant) not in self._seen or not self.may_record:
            self._seen.add((shapes, variant))
            return self._passes(*arguments, variant=variant)
        self._recorded = self._recorded or shapes
        if shapes != self._recorded:
            return self._passes(*arguments, variant=variant)
        if variant not in self._recordings:
            self._recordings[variant] = self._record(arguments, variant)
        recording = self._recordings[variant]
        if recording is None:
            return self._passes(*arguments, variant=variant)
        for static, argument in zip(recording.arguments, arguments, strict=True):
            if static is not None and argument is not None:
                static.copy_(argument)
        recording.graph.replay()
        return recording.loss.clone()  # the next replay writes there

    def _record(self, arguments: Arguments, variant: Variant) -> _Recording | None:
        """None, and a line in the log, where something cannot be recorded, here or on another rank."""
        inputs, targets, seq_idx, n_targets = arguments
        static = _copy(inputs), _copy(targets), None if seq_idx is None else _copy(seq_idx), _copy(n_targets)
        others = [other.graph.pool() for other in self._recordings.values() if other is not None]
        recorded = record(lambda: self._passes(*static, variant=variant), "the step", others[0] if others else None)
        if self._any_rank(recorded is None):
            if recorded is not None:
                _log.warning("engine.cuda_graphs: another rank cannot record the step, it goes on without a graph")
            self._undo()
            return None
        assert recorded is not None
        self.has_recorded = True
        return _Recording(recorded[0], static, recorded[1])


class GraphedUpdate:
    """Calls `update`, which reads and writes the same memory every time, and from the second call on replays it."""

    def __init__(self, update: Callable[[], object]) -> None:
        self._update = update
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 2 and (recorded := record(self._update, "the update")) is not None:
            self._graph = recorded[0]
        if self._graph is None:
            self._update()
        else:
            self._graph.replay()


def record(work: Callable[[], T], name: str, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T] | None:
    """A graph of what `work` launches and what it returned; None, and a line in the log, where that cannot be.

    pool: memory of another graph, which never runs at the same time.
    """
    # An engine of before, with graphs of its own, that were collected in the middle of a recording would break it off.
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    graph = None
    try:
        pool = pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # A recording that fails would leave its own stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            # Other threads (the checkpoint's, the one that pins batches) may go on with what they do.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = work()
    except RuntimeError as error:
        _log.warning("engine.cuda_graphs: %s cannot be recorded, it goes on without a graph: %s", name, _cause(error))
        if graph is not None:
            _end_recording(graph, pool)
        return None
    finally:
        if collects:
            gc.enable()
    _graphs.add(graph)
    return graph, result


def _cause(error: RuntimeError) -> str:
    """What broke a recording off, which comes before what its end says.

    As a variable of the function that caught it, it would keep the frames of the passes, and with them their
    activations, until Python next looks for cycles.
    """
    return " ".join(str(error.__context__ or error).split())[:300]


def _end_recording(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """After one that CUDA broke off, or that left streams behind, torch's allocator and generator believe it goes on.

    All memory that it took would stay taken, and no random number could be drawn on the device.
    """
    try:
        graph.pool()
    except RuntimeError:  # torch has not come to the end of it
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # it may have come as far as that
            torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


def _end_graphs() -> None:
    """NCCL does not let a process group go before all graphs that hold one of its collectives have gone."""
    if _graphs:
        torch.cuda.synchronize()
    for graph in list(_graphs):
        graph.reset()


before_leaving(_end_graphs)


def _copy(tensor: Tensor) -> Tensor:
    """A copy of the same strides, for which nothing is compiled again."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
