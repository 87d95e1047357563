"""An engine whose passes and update are graphs, on a machine that has none: what they launch is played back.

Unlike a GPU's, these graphs share no memory between tensors; the rest of what a graph does, or does not, they do: they
read and write the tensors that they saw, and no line of Python runs again. tests/gpu/test_graphs.py has real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.engine import Judgement
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.replicated import ReplicatedEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=16, d_state=4), tokenizer_vocab_size=31)
recording = False


class Graph(TorchDispatchMode):
    """The operations that it saw, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def pool(self) -> object:
        return self

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.detach().clone()) for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
        results = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, tree_flatten(results)[0]))
        return results

    def undo(self) -> None:
        """Nothing is computed while a graph is recorded."""
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for operator, args, kwargs, seen in self.calls:
                for place, result in zip(seen, tree_flatten(operator(*args, **kwargs))[0], strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                        place.copy_(result)


class Through(TorchDispatchMode):
    """Below any mode autocast leaves our operators, which are Python here, alone: so both runs are below one."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operator(*args, **(kwargs or {}))


@contextmanager
def record(graph: Graph, **_: Any) -> Iterator[None]:
    global recording
    recording = True
    with graph:
        yield
    graph.undo()
    recording = False


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    made: list[Graph] = []

    def make() -> Graph:
        made.append(Graph())
        return made[-1]

    for name, fake in (
        ("CUDAGraph", make),
        ("graph_pool_handle", lambda: (0, 1)),
        ("graph", record),
        ("stream", lambda _: nullcontext()),
        ("current_stream", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def make(kind: type[NativeEngine], monkeypatch: pytest.MonkeyPatch, recorded: bool, precision: str) -> NativeEngine:
    monkeypatch.setattr(NativeEngine, "_records", lambda self: recorded)
    for name in ("alloc_storage", "free_storage"):  # what is gathered stays at its place, as a graph's memory does
        monkeypatch.setattr(_fsdp_param, name, lambda tensor: None)
    monkeypatch.setattr(_fsdp_param_group, "alloc_storage", lambda tensor: None)
    monkeypatch.setattr(NativeEngine, "_is_recording", lambda self: recording)
    engine = kind(EngineConfig(device=DeviceKind.cpu, precision=Precision(precision)), join())
    engine.prepare(MODEL, OptimConfig(lr=1e-2, max_grad_norm=2.0), seed=0)
    return engine


def unsharded(engine: NativeEngine) -> Iterator[Tensor]:
    """The memory that FSDP2 gathers into."""
    for module in engine.model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for parameter in group.fsdp_params:
                yield from parameter.all_gather_outputs


def run(engine: NativeEngine, n_micro_batches: int) -> tuple[list[tuple[float, float, bool]], dict[str, Tensor]]:
    """Steps of which one is refused, one has another shape, one comes after weights were set back, and evaluations."""
    generator = torch.Generator().manual_seed(0)
    found, saved = [], {}
    for step in range(10):
        pieces = engine.pieces()
        both = pieces.model | pieces.optimizer
        if step == 2:
            saved = {key: piece.values.clone() for key, piece in both.items()}
        if step == 7:
            with torch.no_grad():
                for key, piece in both.items():
                    piece.values.copy_(saved[key])
            engine.pieces_changed()
        length = 9 if step == 5 else 12
        n_targets = torch.tensor(2.0 * length * n_micro_batches)
        loss = 0.0
        batches = [torch.randint(0, 31, (2, length + 1), generator=generator) for _ in range(n_micro_batches)]
        for tokens in engine.micro_batches(batches):
            loss += engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets).item()
        refused = step in (0, 4)
        result = engine.step(1e-2, lambda square, skip=refused: Judgement(square.sqrt().item(), skip))
        found.append((loss, result.grad_norm, result.skipped))
        if step > 7:
            with torch.no_grad(), engine.compute():
                found.append((engine.model(tokens[:, :-1], tokens[:, 1:]).item(), 0.0, False))
    model, optimizer = whole_state(engine)
    return found, model | optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n_micro_batches", [1, 2, 4])
@pytest.mark.parametrize("kind", [NativeEngine, ReplicatedEngine, ShardedEngine])
def test_a_recorded_run_is_the_plain_one(
    kind: type[NativeEngine], n_micro_batches: int, precision: str, monkeypatch: pytest.MonkeyPatch, graphs: list[Graph]
) -> None:
    with Through():
        expected, plain = run(make(kind, monkeypatch, False, precision), n_micro_batches)
        assert not graphs
        found, recorded = run(make(kind, monkeypatch, True, precision), n_micro_batches)
    n_kinds = min(n_micro_batches, 3 if kind is ReplicatedEngine else 2)
    n_updates = len({norm > 2.0 for _, norm, _ in expected[1:10]})
    assert n_kinds < len(graphs) <= n_kinds + n_updates
    assert found == expected
    assert recorded.keys() == plain.keys()
    assert all(torch.equal(recorded[key], plain[key]) for key in plain)


@pytest.mark.parametrize("kind", [NativeEngine, ReplicatedEngine, ShardedEngine])
@pytest.mark.parametrize("place", ["forward", "backward", "end", "other rank"])
def test_a_recording_that_fails_leaves_no_trace(
    place: str,
    kind: type[NativeEngine],
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[Graph],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of the passes, wherever it fails, or only that of another rank does; that of the update does not."""
    failures = []

    def fail(*_: Any) -> None:
        if recording and len(failures) < 2:  # kinds of micro-batches
            failures.append(place)
            raise RuntimeError("operation not permitted when stream is capturing")

    def fail_backward(*call: Any) -> None:
        if call[2].requires_grad:
            call[2].register_hook(fail)

    @contextmanager
    def failing(graph: Graph, **_: Any) -> Iterator[None]:
        global recording
        recording = True
        try:
            with graph:
                yield
            if place == "end":
                fail()
        finally:
            graph.undo()
            for gathered in [] if kind is not ShardedEngine else unsharded(engine):
                gathered.fill_(float("nan"))  # nothing was gathered
            recording = False

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with Through():
        expected, plain = run(make(kind, monkeypatch, False, "fp32"), n_micro_batches=2)
        engine = make(kind, monkeypatch, True, "fp32")
        first = engine._bare_model.blocks()[0]
        if place == "forward":
            first.mixer.register_forward_hook(fail)
        if place == "backward":
            first.mixer.register_forward_hook(fail_backward)
        if place == "other rank":
            monkeypatch.setattr(engine._graphed, "_any_rank", lambda failed: failures.append(place) or True)
        found, recorded = run(engine, n_micro_batches=2)
    assert len(failures) == len(caplog.records) == 2
    assert ("another rank" in caplog.text) == (place == "other rank")
    assert found == expected
    assert all(torch.equal(recorded[key], plain[key]) for key in plain)
