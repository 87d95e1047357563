"""The loop in this process: what a step contains, what the hooks add, what a skip does."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_train.checkpoint.storage import complete_steps, load
from mamba_train.composition import compose_config
from mamba_train.config import Config
from mamba_train.data.batches import BatchSource, WindowForm
from mamba_train.data.corpus import Corpus
from mamba_train.data.prepare import prepare
from mamba_train.parallel.engine import Judge, StepResult, accumulate
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.base import Hook
from mamba_train.training.state import TrainState
from mamba_train.training.trainer import Trainer
from tests.helpers import REPOSITORY, TINY_RUN, metrics


def make_config(run_dir: Path, corpus: Path, *overrides: str) -> Config:
    return compose_config(
        [
            "data=local",
            f"data.path={corpus}",
            f"data.cache_dir={corpus.parent / 'cache'}",
            *TINY_RUN,
            "logging.progress=silent",
            f"run_dir={run_dir}",
            *overrides,
        ]
    )


class RecordingEngine:
    """An engine that computes nothing and remembers the tokens it is given."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.steps: list[list[torch.Tensor]] = [[]]

    def model(self, inputs: torch.Tensor, targets: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
        self.steps[-1].append(torch.cat([inputs, targets[:, -1:]], dim=1))
        return torch.zeros(())

    def compute(self) -> Any:
        return nullcontext()

    def micro_batches(self, batches: list[Any]) -> list[Any]:
        return batches

    def backward(self, loss: torch.Tensor) -> None:
        pass

    accumulate = accumulate

    def step(self, lr: float, judge: Judge) -> StepResult:
        self.steps.append([])
        judge(torch.ones((), dtype=torch.float64))
        return StepResult(1.0, skipped=False)

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return value


def global_steps(config: Config, source: BatchSource, world_size: int, micro_batch_size: int) -> list[torch.Tensor]:
    """The tokens of each global step as `world_size` ranks see them, put together in the order of the ranks."""
    config.training.micro_batch_size = micro_batch_size
    config.watchdog.straggler_interval_steps = 0  # this engine has no module to time
    ranks = []
    for rank in range(world_size):
        engine = RecordingEngine(rank, world_size)
        Trainer(config, engine, source, TrainState(), []).run()  # type: ignore[arg-type]
        ranks.append([torch.cat(step) for step in engine.steps[:-1]])
    return [torch.cat(parts) for parts in zip(*ranks, strict=True)]


def test_ranks_and_micro_batches_do_not_change_the_tokens_of_a_step(tmp_path: Path, corpus: Path) -> None:
    config = make_config(
        tmp_path, corpus, "training.total_steps=6", "training.global_batch_size=12", "schedule.warmup_steps=0"
    )
    folder = prepare(config.data, log=lambda text: None)
    source = BatchSource({"": Corpus.open(folder, "train")}, 12, 0, WindowForm(32, with_boundaries=True))
    expected = global_steps(config, source, world_size=1, micro_batch_size=12)
    assert len(expected) == 6
    assert expected[0].shape == (12, 33)
    assert not torch.equal(expected[0], expected[1])
    for world_size, micro_batch_size in [(1, 4), (2, 3), (3, 4), (4, 1), (6, 2)]:
        found = global_steps(config, source, world_size, micro_batch_size)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (world_size, micro_batch_size)


def test_a_run_goes_on_from_the_samples_and_not_from_the_steps(tmp_path: Path, corpus: Path) -> None:
    """They differ when the batch had another size before."""
    config = make_config(tmp_path / "run", corpus, "training.total_steps=9", "schedule.warmup_steps=0")
    source = BatchSource(
        {"": Corpus.open(prepare(config.data, lambda line: None), "train")}, 4, 0, WindowForm(32, True)
    )
    engine = RecordingEngine(0, 1)
    Trainer(config, engine, source, TrainState(step=7, samples=100), []).run()  # type: ignore[arg-type]
    expected = [source.batch(first, slice(None)).tokens for first in (100, 104)]
    assert [torch.equal(torch.cat(step), tokens) for step, tokens in zip(engine.steps[:-1], expected, strict=True)] == [
        True,
        True,
    ]


def test_a_run_records_validates_saves_and_learns(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(run_dir, corpus, "training.total_steps=40", "checkpoint.permanent_interval_steps=12")
    build_trainer(config).run()
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["tokens"] == 40 * 4 * 32
    assert records[-1]["loss"] < records[0]["loss"] - 1.0
    for record in records:
        assert record["bits_per_byte"] > 0
        assert record["tokens_per_second"] > 0
        assert record["mfu"] > 0
        assert not record["skipped"]
        assert ("validation/loss" in record) == (record["step"] % 10 == 0)
        assert ("ssm/layer_01/dt_p50" in record) == (record["step"] == 1 or record["step"] % 10 == 0)
    # The two newest, multiples of 12, and the best; the last one is also the best here.
    assert complete_steps(run_dir / "checkpoints") == [40, 36, 24, 12]
    state = load(run_dir / "checkpoints" / "step_00000040").state["train"]
    assert state["step"] == 40
    assert state["best_validation_loss"] == min(r["validation/loss"] for r in records if "validation/loss" in r)


class Poison(Hook):
    """Makes the gradient of chosen steps infinite, by way of the loss."""

    def __init__(self, steps: set[int]) -> None:
        self._steps = steps

    def on_start(self, trainer: Trainer) -> None:
        backward = trainer.engine.backward
        trainer.engine.backward = lambda loss: backward(  # type: ignore[method-assign]
            loss * (math.inf if trainer.state.step + 1 in self._steps else 1.0)
        )


def test_skipped_steps_are_in_the_ledger_and_everything_else_goes_on(tmp_path: Path, corpus: Path) -> None:
    def run(name: str, steps: set[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        trainer = build_trainer(make_config(tmp_path / name, corpus, "training.total_steps=12"))
        trainer.hooks = [Poison(steps), *trainer.hooks]
        trainer.run()
        checkpoint = load(tmp_path / name / "checkpoints" / "step_00000012")
        return metrics(tmp_path / name), checkpoint.state["train"]

    records, state = run("poisoned", {3, 7})
    plain, _ = run("plain", set())
    assert [record["step"] for record in records if record["skipped"]] == [3, 7] == state["skipped_steps"]
    assert [record["grad_norm"] for record in records if record["skipped"]] == [None, None]
    assert all(math.isfinite(record["loss"]) for record in records)
    for ours, theirs in zip(records, plain, strict=True):
        assert (ours["tokens"], ours["lr"]) == (theirs["tokens"], theirs["lr"])
        assert (ours["loss"] == theirs["loss"]) == (ours["step"] <= 3)


def test_hooks_are_closed_when_a_step_fails(tmp_path: Path, corpus: Path) -> None:
    trainer = build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=12"))
    closed = []

    class Watcher(Hook):
        def on_step(self, trainer: Trainer, metrics: Any) -> None:
            raise ZeroDivisionError

        def close(self, failed: bool) -> None:
            closed.append(failed)

    trainer.hooks = [*trainer.hooks, Watcher()]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert closed == [True]


def test_a_step_waits_for_the_device_as_often_as_it_did_without_a_guard(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value that travels to the host stalls a GPU: loss, norm and requests in one, the interruption in another."""
    waits: list[str] = []

    def counted(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def count(tensor: torch.Tensor, *arguments: Any) -> Any:
            if sys._getframe(1).f_code.co_filename.startswith(str(REPOSITORY / "mamba_train")):
                waits.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, count)

    overrides = ["logging.ssm_health_interval_steps=0", "guard.min_steps=1", "training.total_steps=12"]
    trainer = build_trainer(make_config(tmp_path / "run", corpus, *overrides))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        counted(name)
    for _ in range(8):
        trainer._step()
    assert math.isfinite(trainer.guard.limits[0]), "steps are compared"
    assert waits == ["tolist", "tolist"] * 8
