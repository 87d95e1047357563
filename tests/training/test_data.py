"""Runs on prepared shards: mixtures, masks, domains that are validated on, and what a run refuses."""

import gc
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mamba_train.checkpoint.storage import load
from mamba_train.commands.report import ensure_baseline
from mamba_train.config import Config
from mamba_train.config_data import DataConfig
from mamba_train.data.corpus import Corpus
from mamba_train.data.opening import OpenedData, open_folders
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.training import build
from mamba_train.training.build import build_trainer
from tests.data.folders import write_folder, write_text_folder
from tests.helpers import curve, metrics, train
from tests.training.test_trainer import make_config


def shards_config(run_dir: Path, folders: dict[str, Path], *overrides: str) -> Config:
    return make_config(run_dir, run_dir.parent, *shards(folders), *overrides)


def shards(folders: dict[str, Path]) -> list[str]:
    sources = [f"+data.sources.{name}={folder}" for name, folder in folders.items()]
    return ["data=shards", "data.path=null", *sources, mixture(), "schedule.kind=constant", "schedule.warmup_steps=0"]


def mixture(hard: int = 2, from_step: int = 7) -> str:
    first = rf"{{from_step:0,weights:{{code/Easy \(a\):1,code/Hard:{hard},prose:1}}}}"
    return f"data.mixture=[{first},{{from_step:{from_step},weights:{{prose:1}}}}]"


def run(config: Config) -> list[dict[str, Any]]:
    """Train to the end; returns the metrics."""
    build_trainer(config).run()
    return metrics(Path(config.run_dir))


def test_a_mixture_is_trained_validated_by_domain_and_resumed_with_workers(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    records = run(shards_config(tmp_path / "whole", folders, "training.total_steps=15"))
    said = capsys.readouterr().out
    assert "data: from step 0: code/Easy (a) 25.0000%, code/Hard 50.0000%, prose 25.0000%" in said
    assert "data: from step 7: prose 100.0000%" in said
    assert "data: the state in a checkpoint is " in said
    domains = ["code/Easy (a)", "code/Hard"]
    assert [name for name in records[9] if name.startswith("validation/")] == [
        *(f"validation/{domain}/{figure}" for domain in domains for figure in ("loss", "bits_per_byte")),
        "validation/loss",
        "validation/bits_per_byte",
    ]
    losses = [records[9][f"validation/{domain}/loss"] for domain in domains]
    assert min(losses) < records[9]["validation/loss"] < max(losses)
    # 4 samples a step: a quarter of 28 from prose, and then all of them.
    n_windows = -(-(Corpus.open(folders["prose"], "train").n_tokens - 1) // 32)
    assert records[6]["epochs/prose"] * n_windows == pytest.approx(7, abs=6)
    for step in range(7, 15):
        assert (records[step]["epochs/prose"] - records[step - 1]["epochs/prose"]) * n_windows == pytest.approx(4)
    assert all(record["data_wait_seconds"] >= 0 for record in records)

    for steps, workers in ((5, 0), (10, 1), (15, 0)):
        run(shards_config(tmp_path / "parts", folders, f"training.total_steps={steps}", f"data.workers={workers}"))
    # The last step of each part validates, too.
    assert [point[:6] for point in curve(tmp_path / "parts")] == [point[:6] for point in curve(tmp_path / "whole")]


def test_what_a_resume_refuses_and_what_it_records(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on(steps: int, *overrides: str) -> None:
        run(shards_config(tmp_path / "run", folders, f"training.total_steps={steps}", *overrides))

    def refused(*overrides: str) -> str:
        with pytest.raises(ValueError, match=r"^.+$") as caught:  # one line
            go_on(10, *overrides)
        message = str(caught.value)
        del caught  # and with it the frame that holds the lock of the run folder
        gc.collect()
        return message

    go_on(5)
    assert "data.mixture: 5 steps are done" in refused(mixture(hard=3))
    go_on(8, mixture(from_step=6))

    shard = folders["prose"] / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    assert f"data.sources.prose={folders['prose']}: train-00000.bin has" in refused(mixture(from_step=6))
    shard.write_bytes(content)

    other = folders["prose"].parent / "other"
    tokens = Corpus.open(folders["prose"], "train").tokens().tolist()
    tokenizer = (folders["prose"] / "tokenizer.json").read_bytes()
    folders["prose"] = write_folder(other, {"train": [("", [tokens[:3000]])]}, 300, tokenizer)
    message = refused(mixture(from_step=6))
    assert "of prose (data.sources, data.path) are not the checkpoint's" in message
    assert "data.allow_changed=true" in message
    capsys.readouterr()
    go_on(10, mixture(from_step=6), "data.allow_changed=true")
    assert (
        "warning: data.allow_changed=true: the tokens of prose are others than before step 8" in capsys.readouterr().out
    )
    state = load(tmp_path / "run" / "checkpoints" / "step_00000010").state["data"]
    assert state["changes"] == [{"samples": 32, "sources": ["prose"]}]
    go_on(11, mixture(from_step=6))


def test_the_bigram_baseline_of_a_mixture_is_scored_on_all_domains(tmp_path: Path, folders: dict[str, Path]) -> None:
    run(shards_config(tmp_path / "run", folders, "training.total_steps=1"))
    (
        in_the_way := tmp_path / "run" / f"baseline.json.{os.getpid()}.tmp"
    ).mkdir()  # or the run is somebody else's, or the disk full
    assert str(ensure_baseline(tmp_path / "run")).startswith("it cannot be kept there (")
    in_the_way.rmdir()
    assert ensure_baseline(tmp_path / "run") is None
    baseline = json.loads((tmp_path / "run" / "baseline.json").read_text())
    n_tokens = sum(Corpus.open(folder, "train").n_tokens for folder in folders.values())
    assert baseline["bigram"]["n_train_tokens"] == n_tokens
    assert len(baseline["scored_on"]["data"]) == 1 + 2  # what it is trained on, and two domains
    run(shards_config(tmp_path / "masked", folders, "training.total_steps=1", "data.mask_loss_at_documents=true"))
    assert "first token of a document" in str(ensure_baseline(tmp_path / "masked"))


def test_other_held_out_text_is_mentioned_at_a_resume(
    tmp_path: Path, folders: dict[str, Path], tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out"

    def go_on(steps: int) -> str:
        paths = f"+data.validation_paths.held_out={held_out}"
        run(shards_config(tmp_path / "run", folders, f"training.total_steps={steps}", paths))
        return capsys.readouterr().out

    write_text_folder(held_out, {"validation": [("", ["one text " * 50])]}, tokenizer)
    warning = "warning: the held-out text has changed since the checkpoint"
    assert warning not in go_on(1) + go_on(2)
    shutil.rmtree(held_out)
    write_text_folder(held_out, {"validation": [("", ["another text " * 50])]}, tokenizer)
    assert warning in go_on(3)


def test_a_shard_that_breaks_under_way_is_one_line(tmp_path: Path, corpus: Path, folders: dict[str, Path]) -> None:
    shard = folders["prose"] / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    for offset in range(len(content) // 16 * 2, len(content), len(content) // 16 * 2):
        content[offset : offset + 2] = (60_000).to_bytes(2, "little")
    shard.write_bytes(content)
    result = train(tmp_path / "run", corpus, *shards(folders), "training.total_steps=500", "data.workers=1")
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert re.search(rf"{re.escape(str(shard))}: token 60000 at offset [\d,]+, the vocabulary has 300", line)
    assert len(metrics(tmp_path / "run")) > 1


def test_a_folder_without_a_validation_split_trains_and_says_so(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prose = ["data=shards", f"data.path={folders['prose']}", "training.total_steps=2", "schedule.warmup_steps=0"]
    records = run(make_config(tmp_path / "run", tmp_path, *prose))
    assert "warning: there is no text to validate on; name some by data.validation_paths" in capsys.readouterr().out
    assert not any(name.startswith("validation/") for record in records for name in record)
    judged = f"+data.validation_paths.code={folders['code']}"
    assert "validation/code/Hard/loss" in run(make_config(tmp_path / "other", tmp_path, *prose, judged))[-1]


def test_the_state_in_checkpoints_does_not_grow(tmp_path: Path, corpus: Path) -> None:
    sizes = set()
    for steps in (5, 10, 15):
        trainer = build_trainer(make_config(tmp_path / "run", corpus, f"training.total_steps={steps}"))
        trainer.run()
        state = load(tmp_path / "run" / "checkpoints" / f"step_{steps:08d}").state["data"]
        assert state["samples"] == 4 * steps
        sizes.add(len(json.dumps({**state, "samples": 0})))
    assert len(sizes) == 1
    assert sizes.pop() < 300


def test_a_trainer_closes_its_loader(tmp_path: Path, folders: dict[str, Path]) -> None:
    trainer = build_trainer(shards_config(tmp_path / "run", folders, "training.total_steps=1"))
    closed_after: list[int] = []
    trainer.loader.close = lambda: closed_after.append(trainer.state.step)  # type: ignore[method-assign]
    trainer.run()
    assert closed_after[-1] == 1


def test_a_domain_too_small_to_validate_on_is_mentioned(
    tmp_path: Path, folders: dict[str, Path], tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_text_folder(
        tmp_path / "held_out", {"validation": [("Large", ["one text " * 50]), ("Rare", ["x"])]}, tokenizer
    )
    paths = f"+data.validation_paths.v={held_out}"
    [record] = run(shards_config(tmp_path / "run", folders, "training.total_steps=1", paths))
    assert (
        "warning: not validated on, as they have fewer tokens than one window of 33: v/Rare" in capsys.readouterr().out
    )
    assert [name for name in record if name.endswith("/loss")] == ["validation/v/Large/loss", "validation/loss"]


def test_shards_are_hashed_by_one_rank_only(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bool] = []
    original = build.open_data

    def recorded(data: DataConfig, log: Any) -> OpenedData:
        hashed.append(data.check_hashes)
        return original(data, log)

    monkeypatch.setattr(build, "open_data", recorded)
    build_trainer(shards_config(tmp_path / "run", folders, "data.check_hashes=true"))
    assert hashed == [True, False]  # what the first rank does before the others, and what each rank does


def test_nodes_with_different_copies_of_the_shards_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = open_folders({"prose": folders["prose"]}, {})
    build._check_same(mine, build._what_is_read(mine))
    refused = r"^data\.path, data\.sources: .* has other tokens than on the node of rank 0"
    for other in (
        open_folders({"prose": folders["code"]}, {}),  # other tokens
        open_folders({"prose": folders["prose"]}, {"v": folders["code"]}),  # other held-out text
    ):
        with pytest.raises(ValueError, match=refused):
            build._check_same(mine, build._what_is_read(other))
    answers = iter([build._what_is_read(other), build._what_is_read(mine)])  # of rank 0, and of this one
    monkeypatch.setattr(build, "_what_is_read", lambda data: next(answers))
    with pytest.raises(ValueError, match=refused):
        build_trainer(shards_config(tmp_path / "run", folders))
