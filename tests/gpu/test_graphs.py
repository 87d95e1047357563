"""A recorded step computes what one that is launched piece by piece does, bit by bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mamba_train.config import EngineConfig, ModelConfig, OptimConfig, Precision, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.graphed import GraphedPasses
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.replicated import ReplicatedEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import join
from tests.helpers import metrics, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = {
    "mamba": ModelConfig(name="test", n_layer=2, d_model=64, d_state=16),
    "mamba2": ModelConfig(name="test", mixer="mamba2", n_layer=2, d_model=64, d_state=16, head_dim=32),
}


def steps(model: ModelConfig, recorded: bool, **settings: object) -> tuple[NativeEngine, list[tuple[float, float]]]:
    """Five steps of two micro-batches, the fourth with another shape; loss and gradient norm of each.

    Compiled, all have one shape: the compiler takes other kernels for the old one after it has seen a second.
    """
    engine = NativeEngine(EngineConfig(cuda_graphs=recorded, **settings), join())  # type: ignore[arg-type]
    engine.prepare(resolve_model_config(model, tokenizer_vocab_size=97), OptimConfig(lr=1e-2), seed=0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(5):
        loss = 0.0
        for _ in range(2):
            length = 40 if step == 3 and not settings.get("compile") else 64
            tokens = torch.randint(0, 97, (3, length + 1), generator=generator)
            starts = torch.randint(0, 20, (3, length + 1), generator=generator) == 0
            seq_idx = starts.cumsum(1, dtype=torch.int32)
            n_targets = torch.tensor(6.0 * length)
            tokens, seq_idx, n_targets = tokens.cuda(), (seq_idx - seq_idx[:, :1]).cuda(), n_targets.cuda()
            arguments = (tokens[:, :-1], tokens[:, 1:], seq_idx[:, :-1], n_targets)  # views, as the training has them
            loss += engine.accumulate(*arguments).item()
        found.append((loss, engine.step(1e-2).grad_norm))
    return engine, found


@pytest.mark.parametrize("settings", [{}, {"recompute": Recompute.layer}, {"compile": True}], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_bits(name: str, settings: dict[str, object]) -> None:
    engine, found = steps(MODELS[name], True, **settings)
    assert engine._graphed is not None
    assert engine._graphed.has_recorded, "nothing was recorded"
    plain, expected = steps(MODELS[name], False, **settings)
    assert plain._graphed is None
    assert found == expected
    for ours, theirs in zip(whole_state(engine), whole_state(plain), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ReplicatedEngine, {}),
        (ReplicatedEngine, {"reduce_precision": Precision.bf16}),
        (ShardedEngine, {}),
        (ShardedEngine, {"reshard_after_forward": False}),
        (ReplicatedEngine, {"compile": True}),
        (ShardedEngine, {"compile": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_sums_over_ranks_are_part_of_a_graph(
    micro_batches: int, kind: type[NativeEngine], settings: dict[str, object]
) -> None:
    """One rank, which speaks with itself: by NCCL all the same. Between steps the model is evaluated."""
    found = {}
    for recorded in (True, False):
        engine = kind(EngineConfig(cuda_graphs=recorded, **settings), join())  # type: ignore[arg-type]
        engine.prepare(resolve_model_config(MODELS["mamba"], tokenizer_vocab_size=97), OptimConfig(lr=1e-2), seed=0)
        generator = torch.Generator().manual_seed(0)
        found[recorded] = []
        for _ in range(6):
            tokens = torch.randint(0, 97, (micro_batches, 3, 65), generator=generator).cuda()
            n_targets = torch.tensor(192.0 * micro_batches, device="cuda")
            for batch in engine.micro_batches(list(tokens)):
                loss = engine.accumulate(batch[:, :-1], batch[:, 1:], None, n_targets).item()
            norm = engine.step(1e-2).grad_norm
            with torch.no_grad(), engine.compute():
                found[recorded].append((loss, norm, engine.model(batch[:, :-1], batch[:, 1:]).item()))
        assert (engine._graphed is not None and engine._graphed.has_recorded) == recorded
    assert found[True] == found[False]
    assert found[True][-1][0] < found[True][0][0]


def with_a_rollback(recorded: bool) -> tuple[list[str], NativeEngine]:
    """Steps of which one is skipped, then back to the weights and moments of an earlier one."""
    engine = NativeEngine(EngineConfig(cuda_graphs=recorded), join())
    engine.prepare(resolve_model_config(MODELS["mamba2"], tokenizer_vocab_size=97), OptimConfig(lr=1e-2), seed=0)
    generator = torch.Generator().manual_seed(0)
    found, saved = [], {}
    for step in range(7):
        pieces = engine.pieces()
        if step == 2:
            saved = {key: piece.values.clone() for key, piece in (pieces.model | pieces.optimizer).items()}
        if step == 5:
            for key, piece in (pieces.model | pieces.optimizer).items():
                piece.values.copy_(saved[key])
            engine.pieces_changed()
        tokens = torch.randint(0, 97, (3, 65), generator=generator).to(engine.device)
        n_targets = torch.tensor(0.0 if step == 3 else 192.0, device=engine.device)
        loss = engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets)
        result = engine.step(1e-2)
        found.append(f"{loss.item()} {result.grad_norm} {result.skipped}")
    return found, engine


def test_the_same_bits_after_a_skipped_step_and_a_rollback() -> None:
    found, engine = with_a_rollback(True)
    assert engine._graphed is not None
    assert engine._graphed.has_recorded, "nothing was recorded"
    expected, plain = with_a_rollback(False)
    assert found == expected
    assert [line.endswith("True") for line in found] == [step == 3 for step in range(7)]
    for ours, theirs in zip(whole_state(engine), whole_state(plain), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("how", ["wait", "stream left behind", "error"])
def test_a_recording_that_fails_leaves_everything_as_it_was(how: str) -> None:
    """Stream, random numbers and memory: torch itself does not come to the end of a recording that CUDA breaks off."""
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    side = torch.cuda.Stream()
    reserved = []

    def passes(inputs: Tensor, *_: Tensor | None, variant: object) -> Tensor:
        large = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        reserved.append(torch.cuda.memory_reserved())
        loss = (weight * inputs).sum()
        if torch.cuda.is_current_stream_capturing():
            if how == "wait":
                loss.item()
            if how == "stream left behind":
                side.wait_stream(torch.cuda.current_stream())
            raise RuntimeError("on purpose")
        del large
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    graphed = GraphedPasses(passes)
    stream = torch.cuda.current_stream()
    inputs = torch.tensor([1.0, 2.0, 4.0], device="cuda")
    for _ in range(3):
        assert graphed(inputs, inputs, None, inputs).item() == 7
        assert torch.cuda.current_stream() == stream
        assert weight.grad is not None
        assert torch.equal(weight.grad, inputs)
        weight.grad.zero_()
    assert len(reserved) == 4, "the second call is recorded, in vain, and run"
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < min(reserved) - 2**27
    assert torch.rand(3, device="cuda").sum() > 0
    torch.cuda.synchronize()
    # What another stream has used is free again when that stream is done: not while torch believes that it records.
    active = torch.cuda.memory_stats()["active_bytes.all.current"]
    large = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    large.record_stream(side)
    del large
    torch.cuda.synchronize()
    torch.empty(8, device="cuda")
    assert torch.cuda.memory_stats()["active_bytes.all.current"] < active + 2**27


def test_a_run_is_the_same_and_resumes(tmp_path: Path, corpus: Path) -> None:
    overrides = ("training.total_steps=40", "schedule=constant", "engine.device=cuda")
    for folder, graphs in (("graphs", "true"), ("plain", "false")):
        result = train(tmp_path / folder, corpus, *overrides, f"engine.cuda_graphs={graphs}")
        assert result.returncode == 0, result.stderr
    expected = [record["loss"] for record in metrics(tmp_path / "plain")]
    assert [record["loss"] for record in metrics(tmp_path / "graphs")] == expected
    short = ("training.total_steps=15", *overrides[1:])
    assert train(tmp_path / "two", corpus, *short, "engine.cuda_graphs=true").returncode == 0
    assert train(tmp_path / "two", corpus, *overrides, "engine.cuda_graphs=true").returncode == 0
    assert [record["loss"] for record in metrics(tmp_path / "two")] == expected
