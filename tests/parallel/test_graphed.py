import atexit
import gc
import logging
import os
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from mamba_train import ranks
from mamba_train.parallel.graphed import GraphedPasses, record


def fake_cuda(monkeypatch: pytest.MonkeyPatch, graph_class: type, **others: object) -> None:
    """What recording takes from torch.cuda, on a machine without a GPU."""
    fakes = {
        "CUDAGraph": graph_class,
        "graph_pool_handle": lambda: (0, 1),
        "graph": lambda *_, **__: nullcontext(),
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: None,
    }
    for name, fake in (fakes | others).items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that cannot record a graph")
def test_what_cannot_be_recorded_goes_on_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(3))

    def passes(inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor, variant: object) -> Tensor:
        loss = ((weight * inputs - targets) ** 2).sum() / n_targets
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    graphed = GraphedPasses(passes)
    found, expected = [], []
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
            arguments = (inputs, torch.zeros(2, 3), None, torch.tensor(6.0))
            loss = graphed(*arguments)
            found.append((loss.item(), weight.grad.clone()))  # type: ignore[union-attr]
            weight.grad = None
            loss = passes(*arguments, variant=None)
            expected.append((loss.item(), weight.grad.clone()))  # type: ignore[union-attr]
            weight.grad = None
    for ours, plain in zip(found, expected, strict=True):
        assert ours[0] == plain[0]
        assert torch.equal(ours[1], plain[1])
    assert [record.message for record in caplog.records if "without a graph" in record.message] != []
    assert len(caplog.records) == 1


def test_what_is_recorded_has_the_strides_of_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other ones a compiled model would be compiled again while the graph is recorded, which fails."""
    calls: list[tuple[tuple[int, ...], ...]] = []
    recorded: list[tuple[Tensor, ...]] = []
    weight = nn.Parameter(torch.ones(5))

    def passes(inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor, variant: object) -> Tensor:
        assert seq_idx is not None
        calls.append(tuple(tensor.stride() for tensor in (inputs, targets, seq_idx)))
        recorded[:] = [(inputs, targets, seq_idx, n_targets)]
        loss = ((weight * inputs - targets) * seq_idx).sum() / n_targets
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    class Graph:
        def replay(self) -> None:
            passes(*recorded[0], variant=None)

    fake_cuda(monkeypatch, Graph)
    graphed = GraphedPasses(passes)
    gradients = []
    for seed in range(4):
        whole = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(seed))
        arguments = (whole[0, :, :-1], whole[0, :, 1:], whole[1, :, :-1], torch.tensor(6.0))
        graphed(*arguments)
        gradients.append(weight.grad)
        assert weight.grad is not None
        expected = (arguments[0] * arguments[2]).sum(0) / 6
        # The fake computes when it records, too, where a graph does not.
        torch.testing.assert_close(weight.grad, 2 * expected if seed == 1 else expected)
        weight.grad.zero_()
    assert calls == [((6, 1),) * 3] * len(calls)
    assert gradients[1] is gradients[2] is gradients[3]


def test_a_process_that_leaves_ends_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for them for ever."""
    ended = []

    class Graph:
        def reset(self) -> None:
            ended.append("graph")

    fake_cuda(monkeypatch, Graph, synchronize=lambda: None)
    kept, gone = record(lambda: None, "kept"), record(lambda: None, "gone")
    assert kept is not None
    assert gone is not None
    del gone
    gc.collect()

    class OfTwo:
        world_size = 2

        def any(self, flag: bool) -> None:
            ended.append("agreed")

    monkeypatch.setattr(ranks, "_joined", OfTwo())
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append("groups"))
    for place, name in ((threading, "_shutdown"), (atexit, "_run_exitfuncs")):
        monkeypatch.setattr(place, name, lambda: None)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    ranks.leave()
    assert ended == ["graph", "agreed", "groups"]


def test_nothing_is_collected_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log has the error that broke a recording off, not what the recording's end makes of it."""

    class Recording:
        def __enter__(self) -> None: ...
        def __exit__(self, kind: object, *_: object) -> None:
            if kind is not None:
                raise RuntimeError("failed due to a previous error")

    class Graph:
        def pool(self) -> tuple[int, int]:
            return 0, 1

    fake_cuda(monkeypatch, Graph, graph=lambda *_, **__: Recording())
    assert gc.isenabled()
    recorded = record(gc.isenabled, "the step")
    assert recorded is not None
    assert recorded[1] is False
    assert gc.isenabled()

    activations = []

    def fails() -> None:
        activation = torch.ones(3)
        activations.append(weakref.ref(activation))
        raise ValueError("the first error")

    gc.disable()
    try:
        with caplog.at_level(logging.WARNING):
            assert record(fails, "the step") is None
        assert activations[0]() is None, "what follows needs that memory"
    finally:
        gc.enable()
    assert "the first error" in caplog.text


def test_torch_is_told_that_a_recording_is_over_which_could_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its allocator would go on to keep the memory, and its generator to refuse."""
    told: list[object] = []

    class Recording:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Graph:
        def pool(self) -> None:
            raise RuntimeError("without a preceding successful capture")

    class Generator:
        def clone_state(self) -> str:
            return "fresh"

        def graphsafe_set_state(self, state: str) -> None:
            told.append(state)

    fake_cuda(
        monkeypatch,
        Graph,
        graph=lambda *_, **__: Recording(),
        current_device=lambda: 0,
        default_generators=[Generator()],
    )
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: told.append((name, device, pool)))
    assert record(lambda: None, "the step") is None
    assert told == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1)), "fresh"]
