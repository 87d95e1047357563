"""Several refused steps in a row: back to a good checkpoint, past the data, and the same after a kill at any point."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mamba_train.checkpoint.layout import step_folders
from mamba_train.checkpoint.storage import load
from mamba_train.data.corpus import Corpus
from mamba_train.monitor.event_log import read_events
from mamba_train.monitor.jsonl import JsonlSink
from mamba_train.training.build import build_trainer
from mamba_train.training.events import KEPT_DOCUMENTS
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.hooks.checkpointing import CheckpointHook
from mamba_train.training.hooks.recording import RecordingHook
from mamba_train.training.hooks.rollback import GaveUp, RollbackHook
from mamba_train.training.trainer import Trainer
from tests.helpers import metrics
from tests.training.test_trainer import Poison, make_config

GUARD = ["training.total_steps=30", "guard.rollback_after=3", "guard.min_steps=4", "checkpoint.keep_last=4"]


def train(run_dir: Path, corpus: Path, steps: set[int], *hooks: Hook, overrides: tuple[str, ...] = ()) -> Trainer:
    """Checkpoints every 5 steps; the gradients of `steps` are not finite."""
    trainer = build_trainer(make_config(run_dir, corpus, *GUARD, *overrides))
    trainer.hooks = [Poison(steps), *trainer.hooks, *hooks]
    trainer.run()
    return trainer


def tail(run_dir: Path, after: int) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in metrics(run_dir) if r["step"] > after]


def weights(run_dir: Path) -> dict[str, Any]:
    checkpoint = load(run_dir / "checkpoints" / "step_00000030")
    return {**checkpoint.model, **checkpoint.optimizer}


def test_a_row_of_refused_steps_leads_back_and_past_the_data(tmp_path: Path, corpus: Path) -> None:
    train(tmp_path / "run", corpus, {12, 13, 14})
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records if record["skipped"]] == [11, 12, 13, 14]
    assert [record["tokens"] for record in records] == [step * 4 * 32 for step in range(1, 31)]
    state = load(tmp_path / "run" / "checkpoints" / "step_00000030").state["train"]
    assert state["skipped_steps"] == [11, 12, 13, 14]
    assert [(entry["step"], entry["action"]) for entry in state["ledger"]] == [
        (12, "skip"), (13, "skip"), (14, "skip"), (14, "rollback"),
    ]  # fmt: skip
    assert state["ledger"][-1]["to_step"] == 10
    assert state["ledger"][-1]["samples"] == [40, 56]
    assert state["guard"]["applied"] == 16
    # What a run does that never saw steps 11 to 14 at all: the weights of step 10, the data and rate of step 15.
    never = build_trainer(make_config(tmp_path / "never", corpus, *GUARD))
    never.hooks = [Poison({11, 12, 13, 14}), *(hook for hook in never.hooks if not isinstance(hook, RollbackHook))]
    never.run()
    assert tail(tmp_path / "never", 14) == tail(tmp_path / "run", 14)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "never")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_ledger_names_data_and_layers(tmp_path: Path, corpus: Path) -> None:
    trainer = train(tmp_path / "run", corpus, {12})
    (event,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "skip"]
    (entry,) = trainer.state.ledger
    assert entry == {key: event[key] for key in entry}
    assert (entry["step"], entry["cause"], entry["grad_norm"]) == (12, "not finite", None)
    assert math.isfinite(entry["loss"])
    assert entry["samples"] == [44, 48]
    assert all(norm is None for _, norm in entry["layers"])
    assert {part for part, _ in entry["layers"]} == {"embedding", "norm", "layer_00", "layer_01"}
    # The documents are those whose tokens the step read.
    (path,) = {Path(name) for name in entry["documents"]}
    index = Corpus.open(path.parent, "train")
    batch = trainer.source.batch(44, slice(None))
    for row, (first, last) in zip(batch.tokens, entry["documents"][str(path)], strict=True):
        n_ends = int((row[:-1] == index.eos_id).sum())
        assert last - first == n_ends
    assert json.loads(json.dumps(event)) == event


class Killed(Exception):
    pass


class Die(Hook):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if trainer.state.step == self._step:
            raise Killed


@pytest.mark.parametrize("where", ["decided", "loaded", "saved", "later", "unsaved"])
def test_a_kill_around_a_rollback_changes_nothing(
    where: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {12, 13, 14}
    train(tmp_path / "plain", corpus, bad)
    run_dir, hooks = tmp_path / "run", [Die({"saved": 14, "later": 17}[where])] if where in ("saved", "later") else []

    def killed(*arguments: Any, **named: Any) -> None:
        raise Killed

    save = CheckpointHook.save_now

    def save_or_die(hook: CheckpointHook, trainer: Trainer) -> None:
        (killed if trainer.state.skipped_steps else save)(hook, trainer)

    patches: dict[str, tuple[type, str, Any]] = {
        "decided": (RollbackHook, "_go_back", killed),
        "loaded": (RecordingHook, "pass_over", killed),
        "unsaved": (CheckpointHook, "save_now", save_or_die),
    }
    with monkeypatch.context() as patch:
        if where in patches:
            patch.setattr(*patches[where])
        with pytest.raises(Killed):
            train(run_dir, corpus, bad, *hooks)
    # What happened once to the data or to a device need not happen again: the rollback is carried out all the same.
    train(run_dir, corpus, set())
    assert tail(run_dir, 14) == tail(tmp_path / "plain", 14)
    ours, theirs = weights(run_dir), weights(tmp_path / "plain")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records if record["skipped"]] == [11, 12, 13, 14]
    kinds = [event["kind"] for event in read_events(run_dir)]
    assert kinds.count("rollback") == 1
    ledgers = [
        load(folder / "checkpoints" / "step_00000030").state["train"]["ledger"]
        for folder in (run_dir, tmp_path / "plain")
    ]
    assert ledgers[0] == ledgers[1]


def test_a_checkpoint_that_led_to_trouble_again_is_not_used_twice(tmp_path: Path, corpus: Path) -> None:
    trainer = train(tmp_path / "run", corpus, {12, 13, 14, 18, 19, 20})
    backs = [(entry["step"], entry["to_step"]) for entry in trainer.state.ledger if entry["action"] == "rollback"]
    assert backs == [(14, 10), (20, 5)]
    assert trainer.state.skipped_steps == list(range(6, 21))
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 31))


def test_the_checkpoint_before_a_row_outlives_a_save_in_the_row(tmp_path: Path, corpus: Path) -> None:
    """With checkpoint.keep_last=1 the save after step 15, which is one of the refused, would have deleted it."""
    only_one = ("checkpoint.keep_last=1", "checkpoint.keep_best=false")
    trainer = train(tmp_path / "run", corpus, {14, 15, 16}, overrides=only_one)
    backs = [(entry["step"], entry["to_step"]) for entry in trainer.state.ledger if entry["action"] == "rollback"]
    assert backs == [(16, 10)]


def test_a_kill_between_a_save_in_the_row_and_the_decision_changes_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 15 holds three refused steps; the restart must not go on from it with step 16."""
    bad, run_dir = {13, 14, 15}, tmp_path / "run"
    train(tmp_path / "plain", corpus, bad)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RollbackHook, "_newest_good", killed)
        with pytest.raises(Killed):
            train(run_dir, corpus, bad)
    assert step_folders(run_dir / "checkpoints")[0][0] == 15
    trainer = train(run_dir, corpus, set())
    assert tail(run_dir, 15) == tail(tmp_path / "plain", 15)
    assert trainer.state.skipped_steps == [11, 12, 13, 14, 15]
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 31))


def test_a_start_goes_on_where_no_going_back_is_left(tmp_path: Path, corpus: Path) -> None:
    """A person has raised a limit of the guard: then the next step decides, and not what was refused before."""
    bad, none = {13, 14, 15}, "guard.max_rollbacks=0"
    with pytest.raises(GaveUp, match=r"up to step 15, could not be applied, and guard\.max_rollbacks=0"):
        train(tmp_path / "run", corpus, bad, overrides=(none,))
    assert step_folders(tmp_path / "run" / "checkpoints")[0][0] == 15
    trainer = train(tmp_path / "run", corpus, set(), overrides=(none,))
    assert trainer.state.skipped_steps == [13, 14, 15]


def test_a_run_gives_up_when_going_back_does_not_help(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(GaveUp, match=r"going back 2 times has not helped.*ledger\.jsonl"):
        train(tmp_path / "run", corpus, set(range(12, 40)), overrides=("guard.max_rollbacks=2",))
    assert [event["kind"] for event in read_events(tmp_path / "run")][-1] == "gave up"


def test_a_run_gives_up_when_there_is_nothing_to_go_back_to(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(GaveUp, match=r"3 steps in a row, up to step 4,.*no complete checkpoint"):
        train(tmp_path / "run", corpus, set(range(2, 40)))


def test_without_rollbacks_steps_are_only_skipped(tmp_path: Path, corpus: Path) -> None:
    trainer = train(tmp_path / "run", corpus, set(range(12, 20)), overrides=("guard.rollback_after=0",))
    assert trainer.state.skipped_steps == list(range(12, 20))


def test_the_checkpoint_keeps_the_documents_of_the_last_entries_only(tmp_path: Path, corpus: Path) -> None:
    trainer = train(tmp_path / "run", corpus, set(range(5, 30)), overrides=("guard.rollback_after=0",))
    ledger = trainer.state.ledger
    assert [entry["step"] for entry in ledger] == list(range(5, 30))
    assert ["documents" in entry for entry in ledger] == [False] * (25 - KEPT_DOCUMENTS) + [True] * KEPT_DOCUMENTS
    assert all(event["documents"] for event in read_events(tmp_path / "run") if event["kind"] == "skip")


def test_a_full_disk_does_not_stop_a_rollback(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(make_config(tmp_path / "run", corpus, *GUARD))

    def full(self: JsonlSink, step: int) -> None:
        if trainer.state.step:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonlSink, "cut_at", full)
    trainer.hooks = [Poison({12, 13, 14}), *trainer.hooks]
    trainer.run()
    assert trainer.state.step == 30
    (event,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "tracking"]
    assert "metrics.jsonl cannot be cut" in event["text"]
