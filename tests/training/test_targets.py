"""What a loss is divided by: the targets that count, over all ranks and micro-batches, in training and validation."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba_train.config import Config
from mamba_train.data.batches import IGNORE_INDEX, Batch, BatchSource, WindowForm
from mamba_train.data.corpus import Corpus
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.parallel.engine import Judge, StepResult
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.validation import HeldOut, ValidationHook
from mamba_train.training.state import TrainState
from mamba_train.training.trainer import Trainer, summed_loss
from tests.data.folders import write_folder
from tests.helpers import metrics
from tests.training.test_trainer import RecordingEngine, make_config


class Model:
    """In the place of a model: its loss is the number of targets, so that sums can be checked."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.n_calls = 0

    def model(self, inputs: torch.Tensor, targets: torch.Tensor, seq_idx: Any) -> torch.Tensor:
        self.n_calls += 1
        return (targets[targets != IGNORE_INDEX] * 1.0).sum()

    compute = RecordingEngine.compute
    sum_over_ranks = RecordingEngine.sum_over_ranks


@pytest.mark.parametrize("mask", [False, True])
def test_validation_is_the_same_at_any_world_size(folders: dict[str, Path], mask: bool) -> None:
    corpus = Corpus.open(folders["code"], "validation")
    form = WindowForm(16, with_boundaries=True, mask_loss=mask)
    starts = [0, 16, *(end - 8 for end in (corpus.tokens() == corpus.eos_id).nonzero()[0][:18].tolist()), 32]
    batches = [form.read([(corpus, start) for start in starts[n : n + 3]]) for n in range(0, 21, 3)]
    held_out = [HeldOut("a", batches[:5], 10), HeldOut("b", batches[5:], 10)]
    expected = [
        [sum(float(b.targets[b.targets >= 0].sum()) for b in part.batches), sum(b.n_targets for b in part.batches)]
        for part in held_out
    ]
    assert (expected[0][1] + expected[1][1] < 7 * 3 * 16) == mask
    hook = ValidationHook(held_out, 1)
    for world_size in (1, 2, 3, 4, 8):
        ranks = [Model(rank, world_size) for rank in range(world_size)]
        trainers: list[Any] = [SimpleNamespace(engine=engine, check_stop=lambda: None) for engine in ranks]
        sums = torch.tensor([hook._sums(trainer) for trainer in trainers]).sum(0)
        assert sums.tolist() == expected
        # The same number of forward passes on each rank, as engines that gather weights need it.
        assert {engine.n_calls for engine in ranks} == {-(-7 // world_size)}


def masked_config(tmp_path: Path, folder: Path, *overrides: str) -> Config:
    return make_config(
        tmp_path / "run",
        tmp_path,
        "data=shards",
        f"data.path={folder}",
        "data.mask_loss_at_documents=true",
        "schedule.warmup_steps=0",
        *overrides,
    )


def test_the_loss_is_divided_by_the_targets_that_count(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = masked_config(tmp_path, folders["prose"], "training.total_steps=1")
    trainer = build_trainer(config)
    whole = trainer.source.batch(0, slice(None))
    assert whole.n_targets < whole.inputs.numel()
    with torch.no_grad():
        plain = Batch(whole.tokens, whole.seq_idx)
        logits = trainer.engine.model(plain.inputs, None, plain.seq_idx[:, :-1] if plain.seq_idx is not None else None)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), plain.targets.flatten(), reduction="none")
    counted = (whole.inputs != 0).flatten()
    trainer.run()
    [record] = metrics(tmp_path / "run")
    assert record["loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    assert record["loss"] != pytest.approx(losses.mean().item(), rel=1e-4)
    assert record["tokens"] == 4 * 32
    n_windows = -(-(Corpus.open(folders["prose"], "train").n_tokens - 1) // 32)
    assert record["epochs"] == pytest.approx(4 / n_windows)


def test_batches_without_a_target_are_no_nan(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Documents without text: end of document behind end of document, none of them a target."""
    folder = write_folder(tmp_path / "empty", {"train": [("", [[]] * 400)]}, 300, tokenizer.serialised)
    for micro_batch_size in (2, 4):
        config = masked_config(
            tmp_path / str(micro_batch_size),
            folder,
            "training.total_steps=2",
            f"training.micro_batch_size={micro_batch_size}",
        )
        build_trainer(config).run()
        for record in metrics(tmp_path / str(micro_batch_size) / "run"):
            assert record["loss"] == 0
            assert record["grad_norm"] == 0
            assert not record["skipped"]


def test_one_micro_batch_without_a_target_does_not_disturb_the_others(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    texts = [[5, 6, 7, 8] * 100]
    folder = write_folder(tmp_path / "half", {"train": [("", [*texts, *[[]] * 400])]}, 300, tokenizer.serialised)
    config = masked_config(tmp_path, folder, "training.total_steps=1", "training.micro_batch_size=1")
    trainer = build_trainer(config)
    counts = [trainer.source.batch(0, range(row, row + 1)).n_targets for row in range(4)]
    assert 0 in counts
    assert max(counts) == 32
    with torch.no_grad():
        total = sum(
            float(summed_loss(trainer.engine, trainer.source.batch(0, range(row, row + 1)))) for row in range(4)
        )
    trainer.run()
    [record] = metrics(tmp_path / "run")
    assert record["loss"] == pytest.approx(total / sum(counts), rel=1e-5)
    assert math.isfinite(record["grad_norm"])


class MeetingEngine(RecordingEngine):
    """One of several ranks, each in a thread: sums are really taken over all of them. A loss is its targets' sum."""

    def __init__(self, rank: int, world_size: int, meeting: threading.Barrier, values: list[Any]) -> None:
        super().__init__(rank, world_size)
        self.meeting, self.values = meeting, values
        self.losses: list[list[float]] = [[]]

    def model(self, inputs: torch.Tensor, targets: torch.Tensor, seq_idx: Any) -> torch.Tensor:
        return targets[targets != IGNORE_INDEX].double().sum()

    def backward(self, loss: torch.Tensor) -> None:
        self.losses[-1].append(float(loss))

    def step(self, lr: float, judge: Judge) -> StepResult:
        self.losses.append([])
        judge(torch.ones((), dtype=torch.float64))
        return StepResult(1.0, skipped=False)

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        self.values[self.rank] = value
        self.meeting.wait(30)
        total: torch.Tensor = sum(self.values)
        self.meeting.wait(30)
        return total


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 2), (2, 6), (3, 1), (4, 3), (4, 1)])
def test_the_divisor_is_the_count_over_all_ranks_and_micro_batches(
    tmp_path: Path, tokenizer: TextTokenizer, world_size: int, micro_batch_size: int
) -> None:
    """Ranks have very different numbers of targets: long documents, and pages of nothing but ends of documents."""
    texts = [[5, 6, 7, 8] * 100, *[[9]] * 300, *[[]] * 300]
    folder = write_folder(tmp_path / "half", {"train": [("", texts)]}, 300, tokenizer.serialised)
    config = masked_config(tmp_path, folder, "training.total_steps=3", "training.global_batch_size=12")
    config.training.micro_batch_size = micro_batch_size
    config.watchdog.straggler_interval_steps = 0  # this engine has no module to time
    form = WindowForm(32, with_boundaries=True, mask_loss=True)
    source = BatchSource({"": Corpus.open(folder, "train")}, 12, 0, form)
    meeting, values = threading.Barrier(world_size), [None] * world_size
    engines = [MeetingEngine(rank, world_size, meeting, values) for rank in range(world_size)]
    trainers = [Trainer(config, engine, source, TrainState(), []) for engine in engines]  # type: ignore[arg-type]
    for step in range(3):
        with ThreadPoolExecutor(world_size) as pool:
            records = list(pool.map(lambda trainer: trainer._step(), trainers))
        whole = source.batch(12 * step, slice(None))
        by_rank = [int((part != IGNORE_INDEX).sum()) for part in whole.targets.chunk(world_size)]
        assert world_size == 1 or len(set(by_rank)) > 1, "a divisor of each rank's own must not do"
        expected = float(whole.targets[whole.targets != IGNORE_INDEX].double().sum()) / whole.n_targets
        assert sum(loss for engine in engines for loss in engine.losses[step]) == pytest.approx(expected)
        assert [record["loss"] for record in records] == pytest.approx([expected] * world_size)
