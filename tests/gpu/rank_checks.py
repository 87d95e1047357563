"""Checks inside two ranks: `rank_checks.py FOLDER CORPUS [CHECK ...]`, a process for each with RANK and its like set.

All in one start, because starting and compiling are what takes the time. Each check adds a line [name, seconds, error]
to FOLDER/rank_<rank>.jsonl as it ends, with an empty error where it passed; one that takes longer than it may ends the
process, and FOLDER/rank_<rank>.stacks says where it stood.
Without a GPU nothing is recorded, and everything else runs.
"""

import faulthandler
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_train import ranks
from mamba_train.composition import compose_config
from mamba_train.config import EngineConfig, EngineKind, ModelConfig, OptimConfig, Precision, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import sharded
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.state import whole_state
from mamba_train.ranks import Ranks
from mamba_train.training.build import build_trainer
from tests.helpers import TINY_RUN, metrics

FIRST_SECONDS, SECONDS = 90, 40  # that a check may take; the first one compiles
VOCABULARY, LENGTH, ROWS = 97, 64, 3
MODELS = {
    "mamba": ModelConfig(name="test", n_layer=4, d_model=64, d_state=16),
    "mamba2": ModelConfig(name="test", mixer="mamba2", n_layer=4, d_model=64, d_state=16, head_dim=32),
}
FSDP, DDP = EngineKind.fsdp, EngineKind.ddp
sharded.LEAST_UNITS = 2  # of two layers each

Found = tuple[list[str], dict[str, Tensor]]


def build(group: Ranks, mixer: str = "mamba", **settings: Any) -> NativeEngine:
    engine = build_engine(EngineConfig(**settings), group)
    engine.prepare(resolve_model_config(MODELS[mixer], VOCABULARY), OptimConfig(lr=1e-2, max_grad_norm=1.0), seed=0)
    assert isinstance(engine, NativeEngine)
    return engine


def train(engine: NativeEngine, n_micro_batches: int = 1) -> Found:
    """Steps with everything that happens between two replays: what was seen in each, and the state at the end.

    The fourth is skipped, as the gradient is not finite on the last rank; the sixth has another shape; the seventh
    comes after weights and moments were set back; after some the model is evaluated.
    """
    generator = torch.Generator().manual_seed(engine.rank)
    found, saved = [], {}
    for step in range(10):
        pieces = engine.pieces()
        both = pieces.model | pieces.optimizer
        if step == 2:
            saved = {key: piece.values.clone() for key, piece in both.items()}
        if step == 6:
            for key, piece in both.items():
                piece.values.copy_(saved[key])
            engine.pieces_changed()
        length = LENGTH // 2 if step == 5 else LENGTH
        n_targets = 2.0 * ROWS * length * n_micro_batches
        if step == 3 and engine.rank == engine.world_size - 1:
            n_targets = 0.0
        batches = [
            torch.randint(0, VOCABULARY, (ROWS, length + 1), generator=generator) for _ in range(n_micro_batches)
        ]
        loss = torch.zeros((), device=engine.device)
        for batch in engine.micro_batches(batches):
            tokens = batch.to(engine.device)
            divisor = torch.tensor(n_targets, device=engine.device)
            loss += engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, divisor)
        result = engine.step(1e-2)
        found.append(f"{step}: {loss.item()} {result.grad_norm} {result.skipped}")
        if step in (1, 4, 8):
            with torch.no_grad(), engine.compute():
                found.append(f"evaluation: {engine.model(tokens[:, :-1], tokens[:, 1:], None).item()}")
    assert [line.endswith("True") for line in found if "evaluation" not in line] == [step == 3 for step in range(10)]
    model, optimizer = whole_state(engine)
    return found, model | optimizer


def has_recorded(engine: NativeEngine) -> bool:
    return engine._graphed is not None and engine._graphed.has_recorded


def check_same(ours: Found, theirs: Found) -> None:
    differing = [(a, b) for a, b in zip(ours[0], theirs[0], strict=True) if a != b]
    assert not differing, f"{len(differing)} of {len(ours[0])} lines differ, first {differing[0]}"
    unequal = [key for key in theirs[1] if not torch.equal(ours[1][key], theirs[1][key])]
    assert not unequal, f"{len(unequal)} of {len(theirs[1])} tensors differ, first {unequal[0]}"


def a_recorded_run_is_the_plain_one(
    group: Ranks, n_micro_batches: int = 1, mixer: str = "mamba", **settings: Any
) -> None:
    engine = build(group, mixer, **settings)
    ours = train(engine, n_micro_batches)
    assert has_recorded(engine) == (engine.device.type == "cuda")
    plain = build(group, mixer, **settings, cuda_graphs=False)
    theirs = train(plain, n_micro_batches)
    assert not has_recorded(plain)
    check_same(ours, theirs)


def a_recording_that_fails_on_one_rank(group: Ranks, place: str) -> None:
    """All go on without a graph."""
    settings = {"name": FSDP, "reshard_after_forward": False}
    engine = build(group, **settings)
    n_failures = 0

    def fail(*_: Any) -> None:
        nonlocal n_failures
        if group.rank == 1 and engine.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            n_failures += 1
            raise RuntimeError("on purpose")

    def fail_in_backward(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    engine._bare_model.blocks()[1].mixer.register_forward_hook(fail if place == "forward" else fail_in_backward)
    ours = train(engine)
    assert not has_recorded(engine)
    assert n_failures == (group.rank == 1 and engine.device.type == "cuda")
    check_same(ours, train(build(group, **settings, cuda_graphs=False)))
    torch.rand(3, device=engine.device)


def two_ranks_are_near_one_gpu(group: Ranks, name: EngineKind) -> None:
    """The same rows, half of them on each rank, in bf16."""

    class Alone(Ranks):
        def __init__(self) -> None:
            super().__init__(group, group.store)  # type: ignore[arg-type]
            self.rank, self.world_size = 0, 1

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCABULARY, (2 * ROWS, LENGTH + 1), generator=generator) for _ in range(2)] * 10
    found: dict[bool, list[float]] = {}
    for alone in (True, False):
        config = EngineConfig(precision=Precision.bf16, **({} if alone else {"name": name}))  # type: ignore[arg-type]
        engine = NativeEngine(config, Alone()) if alone else build_engine(config, group)
        engine.prepare(resolve_model_config(MODELS["mamba"], VOCABULARY), OptimConfig(lr=3e-3), seed=0)
        found[alone] = []
        for batch in batches:
            tokens = batch.to(engine.device)[slice(None) if alone else slice(group.rank, None, 2)]
            n_targets = torch.tensor(2.0 * ROWS * LENGTH, device=engine.device)
            for _ in engine.micro_batches([0]):
                loss = engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets)
            found[alone].append((loss if alone else group.sum(loss)).item())
            engine.step(3e-3)
    assert found[True][-1] < found[True][0] - 0.5
    assert max(abs(a - b) for a, b in zip(*found.values(), strict=True)) < 2e-2, found


def a_run_is_the_same_and_resumes(group: Ranks, folder: Path, corpus: Path) -> None:
    """By the trainer, as engine=fsdp does by default: with validations and checkpoints, and from one of them."""

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        trainer = build_trainer(compose_config([*shared, f"run_dir={folder / name}", *more]))
        trainer.run()
        assert isinstance(trainer.engine, NativeEngine)
        assert has_recorded(trainer.engine) == (trainer.engine.device.type == "cuda" and not more)
        group.any(False)  # the first rank has written its metrics
        keys = ("loss", "grad_norm", "validation/loss")
        return [{key: record.get(key) for key in keys} for record in metrics(folder / name)]

    model = ("model.n_layer=4", "model.d_model=64", "model.d_state=16", "training.micro_batch_size=2")
    data = ("data=local", f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}", "data.workers=0")
    saves = ("checkpoint.interval_steps=8", "checkpoint.keep_last=9")
    shared = ("engine=fsdp", *data, *TINY_RUN, *model, *saves, "training.total_steps=16")
    expected = run("plain", "engine.cuda_graphs=false")
    assert run("recorded") == expected
    if group.rank == 0:
        checkpoint = Path("checkpoints", "step_00000008")
        shutil.copytree(folder / "recorded" / checkpoint, folder / "resumed" / checkpoint)
    group.any(False)
    assert run("resumed") == expected[8:]


def checks(group: Ranks, folder: Path, corpus: Path) -> dict[str, Callable[[], None]]:
    same = partial(a_recorded_run_is_the_plain_one, group)
    fails = partial(a_recording_that_fails_on_one_rank, group)
    kept = {"name": FSDP, "reshard_after_forward": False}
    return {
        "fsdp, kept": partial(same, **kept),
        "fsdp": partial(same, name=FSDP, reshard_after_forward=True),
        "a run": partial(a_run_is_the_same_and_resumes, group, folder, corpus),
        "fsdp, three micro-batches": partial(same, 3, **kept, reduce_each_micro_batch=True),
        "fsdp near one GPU": partial(two_ranks_are_near_one_gpu, group, FSDP),
        "ddp": partial(same, name=DDP),
        "ddp, three micro-batches": partial(same, 3, name=DDP),
        "ddp near one GPU": partial(two_ranks_are_near_one_gpu, group, DDP),
        "fsdp, sums in bf16": partial(same, **kept, reduce_precision=Precision.bf16),
        "fsdp, layers again": partial(same, name=FSDP, recompute=Recompute.layer),
        "fsdp, mamba2": partial(same, mixer="mamba2", **kept),
        "fails in forward": partial(fails, "forward"),
        "fails in backward": partial(fails, "backward"),
    }


NAMES = list(checks(Ranks(ranks.Launch(), None), Path(), Path()))  # type: ignore[arg-type]


def main() -> None:
    folder, corpus, chosen = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or NAMES
    group = ranks.join()
    own = folder / f"rank_{group.rank}.jsonl"
    limit = FIRST_SECONDS
    with own.open("w") as results, own.with_suffix(".stacks").open("w") as stacks:
        for name, check in checks(group, folder, corpus).items():
            if name not in chosen:
                continue
            faulthandler.dump_traceback_later(limit, exit=True, file=stacks)
            limit, begin, error = SECONDS, time.monotonic(), ""
            try:
                check()
            except Exception:
                error = traceback.format_exc()
            print(json.dumps([name, round(time.monotonic() - begin, 1), error]), file=results, flush=True)
            # By the store: where one has failed, the other may wait in any collective.
            group.post(f"{name}/{group.rank}", True)
            for rank in range(group.world_size):
                group.await_post(f"{name}/{rank}")
            faulthandler.cancel_dump_traceback_later()
    ranks.leave()


if __name__ == "__main__":
    main()
