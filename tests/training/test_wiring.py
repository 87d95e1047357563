"""That the parts are connected: each test fails when one line of `build.py`, the loop or a hook is taken out."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_train.checkpoint.storage import complete_steps, load
from mamba_train.data.loader import BatchLoader
from mamba_train.model.language_model import MambaLM
from mamba_train.parallel.native import NativeEngine
from mamba_train.training import build, hook_list
from mamba_train.training.audit import ContractViolation
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks import recording
from mamba_train.training.hooks.base import Hook
from mamba_train.training.schedule import learning_rate
from mamba_train.training.trainer import Trainer
from tests.helpers import metrics, train, write_corpus
from tests.training.test_trainer import make_config


def test_the_model_gets_the_document_of_each_input(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    forward = MambaLM.forward

    def spy(self: MambaLM, tokens: torch.Tensor, targets: Any = None, seq_idx: Any = None) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            seen.append((tokens, targets, seq_idx))
        return forward(self, tokens, targets, seq_idx)

    monkeypatch.setattr(MambaLM, "forward", spy)
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=5")).run()
    n_boundaries = 0
    for tokens, targets, seq_idx in seen:
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        # A document's last token is end-of-document (id 0), and the next input is in the next one.
        starts = seq_idx[:, 1:] != seq_idx[:, :-1]
        assert torch.equal(starts, tokens[:, :-1] == 0)
        n_boundaries += int(starts.sum())
    assert n_boundaries > 0

    seen.clear()
    config = make_config(tmp_path / "other", corpus, "training.total_steps=5", "data.reset_state_at_documents=false")
    build_trainer(config).run()
    assert all(seq_idx is None for _, _, seq_idx in seen)


def test_the_audit_stops_a_run_before_its_first_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = NativeEngine.prepare

    def broken(value: float, name: str) -> None:
        def prepare_wrongly(self: NativeEngine, *args: Any) -> None:
            prepare(self, *args)
            with torch.no_grad():
                getattr(self.model.layers[1].mixer.ssm, name).fill_(value)  # type: ignore[union-attr,index]

        monkeypatch.setattr(NativeEngine, "prepare", prepare_wrongly)

    for number, (name, value) in enumerate([("dt_bias", 0.0), ("D", 0.5), ("A_log", 0.0)]):
        broken(value, name)
        with pytest.raises(ContractViolation, match=rf"layers\.1\.mixer\.ssm\.{name}"):
            build_trainer(make_config(tmp_path / str(number), corpus))


def test_the_audit_runs_after_a_resume_too(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=5")).run()
    asked: list[bool] = []
    monkeypatch.setattr(build, "audit", lambda engine, config, fresh: asked.append(fresh) or [])
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=10"))
    build_trainer(make_config(tmp_path / "new", corpus, "training.total_steps=10"))
    assert asked == [False, True]


def test_a_corpus_that_changed_is_refused_and_one_that_moved_is_not(tmp_path: Path) -> None:
    first, moved = write_corpus(tmp_path / "first"), tmp_path / "moved"
    run_dir = tmp_path / "run"
    assert train(run_dir, first, "training.total_steps=5").returncode == 0
    first.rename(moved)
    result = train(run_dir, moved, "training.total_steps=10")
    assert result.returncode == 0, result.stderr
    text = next(iter(sorted(moved.iterdir())))
    text.write_text("# changed\n" + text.read_text())
    refused = train(run_dir, moved, "training.total_steps=15")
    assert refused.returncode == 2
    assert "fingerprint" in refused.stderr
    assert len(metrics(run_dir)) == 10


def test_a_checkpoint_never_knows_more_than_the_metrics(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    trainer = build_trainer(make_config(run_dir, corpus, "training.total_steps=12"))
    lines_at_save: list[tuple[int, int]] = []
    pieces = trainer.engine.pieces

    def pieces_while_saving() -> Any:
        lines_at_save.append((trainer.state.step, len(metrics(run_dir))))
        return pieces()

    trainer.engine.pieces = pieces_while_saving  # type: ignore[method-assign]
    trainer.run()
    assert [step for step, _ in lines_at_save] == [5, 10, 12]
    assert all(step == lines for step, lines in lines_at_save)


def test_random_states_continue(tmp_path: Path, corpus: Path) -> None:
    """Nothing draws at random in a step today; what will (dropout) must go on where it was."""

    class Draw(Hook):
        def __init__(self) -> None:
            self.drawn: dict[int, tuple[float, float]] = {}

        def on_step(self, trainer: Trainer, metrics: Any) -> None:
            self.drawn[trainer.state.step] = (torch.rand(()).item(), random.random())

    def run(name: str, steps: int) -> dict[int, tuple[float, float]]:
        trainer = build_trainer(make_config(tmp_path / name, corpus, f"training.total_steps={steps}"))
        draw = Draw()
        trainer.hooks = [draw, *trainer.hooks]
        trainer.run()
        return draw.drawn

    torch.manual_seed(1)
    random.seed(1)
    whole = run("whole", 10)
    torch.manual_seed(1)
    random.seed(1)
    run("parts", 5)
    torch.manual_seed(99)
    random.seed(99)
    rest = run("parts", 10)
    assert list(rest) == [6, 7, 8, 9, 10]
    assert all(whole[step] == rest[step] for step in rest)


class FakeWandb:
    """In the place of `WandbSink`: gives itself an id unless it is told one."""

    asked_for: list[str | None] = []  # noqa: RUF012
    upload_command = None

    def __init__(self, run_dir: Path, logging: Any, config: Any, run_id: str | None, warn: Any) -> None:
        self.asked_for.append(run_id)
        self.run_id = run_id or f"id-{len(self.asked_for)}"

    def log(self, metrics: Any) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


def test_the_wandb_run_is_the_same_after_a_resume(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWandb, "asked_for", [])
    monkeypatch.setattr(recording, "WandbSink", FakeWandb)
    for steps in (5, 10, 15):
        build_trainer(make_config(tmp_path / "run", corpus, f"training.total_steps={steps}")).run()
    assert FakeWandb.asked_for == [None, "id-1", "id-1"]


def test_the_best_checkpoint_is_kept_when_later_ones_are_worse(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, float("nan"), 2.7, 2.9])
    hook = "mamba_train.training.hooks.validation.ValidationHook._sums"
    monkeypatch.setattr(hook, lambda self, trainer: [[next(losses), 1]])
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=60")).run()
    folder = tmp_path / "run" / "checkpoints"
    assert complete_steps(folder) == [60, 55, 20]
    state = load(folder / "step_00000060").state["train"]
    assert (state["best_validation_step"], state["best_validation_loss"]) == (20, 2.0)


def test_a_new_best_is_saved_between_the_regular_saves(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    hook = "mamba_train.training.hooks.validation.ValidationHook._sums"
    monkeypatch.setattr(hook, lambda self, trainer: [[next(losses), 1]])
    overrides = ["training.total_steps=20", "training.validation_interval_steps=4", "checkpoint.keep_last=1"]
    build_trainer(make_config(tmp_path / "run", corpus, *overrides)).run()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [20, 8]


def test_a_first_validation_that_is_nan_is_not_the_best(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan"), 2.0])
    hook = "mamba_train.training.hooks.validation.ValidationHook._sums"
    monkeypatch.setattr(hook, lambda self, trainer: [[next(losses), 1]])
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=20")).run()
    path = tmp_path / "run" / "checkpoints" / "step_00000020" / "state.json"
    state = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert state["train"]["best_validation_step"] == 20


def test_each_step_uses_the_rate_of_the_schedule(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    step = NativeEngine.step
    monkeypatch.setattr(NativeEngine, "step", lambda self, lr, judge: used.append(lr) or step(self, lr, judge))
    config = make_config(tmp_path / "run", corpus, "training.total_steps=12")
    build_trainer(config).run()
    expected = [learning_rate(s, config.optim.lr, config.schedule, 12) for s in range(1, 13)]
    assert used == expected == [record["lr"] for record in metrics(tmp_path / "run")]


def test_validation_reads_the_validation_split(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    validated: list[str] = []
    source_of, sets_of = build.BatchSource, hook_list.validation_sets
    monkeypatch.setattr(
        build,
        "BatchSource",
        lambda corpora, *args: opened.extend(c.split for c in corpora.values()) or source_of(corpora, *args),
    )
    monkeypatch.setattr(
        hook_list,
        "validation_sets",
        lambda corpora, *args: validated.extend(c.split for c in corpora.values()) or sets_of(corpora, *args),
    )
    build_trainer(make_config(tmp_path / "run", corpus))
    assert (opened, validated) == (["train"], ["validation"])


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path, corpus: Path) -> None:
    trainer = build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=5"))
    for resume in ("true", "false"):
        second = train(tmp_path / "run", corpus, "training.total_steps=5", f"checkpoint.resume={resume}")
        assert second.returncode == 2
        assert "is training there" in second.stderr
    trainer.run()
    assert train(tmp_path / "run", corpus, "training.total_steps=10").returncode == 0


def test_compiling_without_a_compiler_is_one_line(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    result = train(tmp_path / "run", corpus, "engine.compile=true", "engine.device=cpu")
    assert result.returncode == 2
    assert result.stderr.startswith("error: engine.compile=true")


def test_how_long_a_save_held_up_the_training_is_a_metric(tmp_path: Path, corpus: Path) -> None:
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=12")).run()
    held_up = {
        r["step"]: r["checkpoint/hold_up_seconds"]
        for r in metrics(tmp_path / "run")
        if "checkpoint/hold_up_seconds" in r
    }
    assert list(held_up) == [6, 11], "the steps after the saves"
    assert all(seconds > 0 for seconds in held_up.values())


def test_the_data_is_looked_for_while_the_model_is_made(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a large compressed file that takes as long, also after a restart."""
    build_trainer(make_config(tmp_path / "run", corpus, "training.total_steps=5")).run()
    done: list[object] = []
    monkeypatch.setattr(BatchLoader, "begin", lambda self, first_sample: done.append(first_sample))
    prepare = NativeEngine.prepare
    monkeypatch.setattr(NativeEngine, "prepare", lambda *arguments: (done.append("model"), prepare(*arguments))[1])
    for name in ("run", "new"):
        build_trainer(make_config(tmp_path / name, corpus, "training.total_steps=10"))
    batch_size = 4
    assert done == [5 * batch_size, "model", 0, "model"]
