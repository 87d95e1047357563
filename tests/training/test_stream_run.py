"""Runs of train.py that stream: killed, and gone on with on other ranks; read to the end; refused."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba_train.composition import compose_config
from mamba_train.monitor.event_log import read_events
from mamba_train.training.build import build_trainer
from mamba_train.training.hooks.rollback import RollbackHook
from tests.data.conftest import make_texts
from tests.data.file_server import Handler, address, serving
from tests.data.streams import write_files, write_tokenizer
from tests.helpers import REPOSITORY, TINY_RUN, environment, metrics
from tests.training.test_trainer import Poison

STEPS = ("training.total_steps=24", "checkpoint.interval_steps=4", "training.global_batch_size=4")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    texts = make_texts(900)
    write_tokenizer(folder / "tokenizer.json", texts[::5])
    return write_files(folder / "text", [texts[i::5] for i in range(5)])


def command(text: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [
        *launcher, str(REPOSITORY / "train.py"), "data=stream", f"data.path={text}", "data.workers=0",
        f"data.tokenizer={text.parent / 'tokenizer.json'}", f"data.cache_dir={text.parent / 'cache'}",
        *[setting for setting in TINY_RUN if not setting.startswith("data.vocab_size")],
        *STEPS, "training.micro_batch_size=2", f"run_dir={run_dir}", *overrides,
    ]  # fmt: skip


def run(text: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(text, run_dir, *overrides, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=300
    )


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_dir)]


def run_until_killed(text: Path, run_dir: Path, *overrides: str) -> None:
    """A run that is killed after step 10, two steps after a checkpoint."""
    python, _, *rest = command(text, run_dir, *overrides)
    killed = subprocess.run(
        [python, str(Path(__file__).with_name("dying.py")), "step", "10", *rest],
        env={**environment(), "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(text: Path, tmp_path: Path) -> None:
    whole = run(text, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "5 files of text" in whole.stdout + whole.stderr
    run_until_killed(text, tmp_path / "killed")
    again = run(text, tmp_path / "killed", "engine=ddp", "engine.device=cpu", ranks=2)
    assert again.returncode == 0, again.stderr
    torch.testing.assert_close(losses(tmp_path / "killed"), losses(tmp_path / "whole"), rtol=2e-5, atol=0)
    places = [json.loads(next((tmp_path / name / "checkpoints").glob("*24/state.json")).read_text())["data"] for name in
              ("killed", "whole")]  # fmt: skip
    assert places[0] == places[1]
    assert {lane["file"] for lane in places[0]["lanes"][""]} <= {f"{i:03d}.jsonl.zst" for i in range(5)}


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_run_at_its_last_checkpoint(text: Path, tmp_path: Path) -> None:
    """And when it is there again, the run goes on from it to the same losses, on other ranks."""
    small = write_files(tmp_path / "text", [make_texts(160, seed=i) for i in range(16)])
    (tmp_path / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    long = "data.sequence_length=512"
    whole = run(small, tmp_path / "whole", long)
    assert whole.returncode == 0, whole.stderr
    with serving({f"/{file.name}": file.read_bytes() for file in sorted(small.iterdir())}) as server:
        patience = ["data.network_retries=1", "data.network_timeout_seconds=5", "data.workers=1", long]
        place = f"data.path='{address(server, '/{000..015}.jsonl.zst')}'"
        # Four lanes with four files each, one after another; the first is enough for some steps.
        server.faults = itertools.chain([None] * 5, itertools.repeat(lambda handler: handler.send_error(503)))
        gone = run(small, tmp_path / "run", place, *patience)
        assert gone.returncode == 1, gone.stderr
        assert re.search(r"http://127.*zst: given up after 2 attempts in a row, the last one: HTTP 503", gone.stderr)
        assert "Traceback" not in gone.stderr
        last = metrics(tmp_path / "run")[-1]["step"]
        assert 4 <= last < 24, gone.stderr
        server.faults = iter([])
        again = run(small, tmp_path / "run", place, *patience, "engine=ddp", "engine.device=cpu", ranks=2)
        assert again.returncode == 0, again.stderr
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=2e-5, atol=0)


@pytest.mark.slow
def test_a_server_that_is_away_for_longer_than_a_step_may_take_is_waited_for(text: Path, tmp_path: Path) -> None:
    """By the rank that asks it, and by the other one, which has its data."""
    small = write_files(tmp_path / "text", [make_texts(160, seed=i) for i in range(16)])
    (tmp_path / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    with serving({f"/{file.name}": file.read_bytes() for file in sorted(small.iterdir())}) as server:
        late = "/006.jsonl.zst"  # the second file of a lane, to be had after pauses of 1, 2 and 4 seconds

        def away(handler: Handler) -> None:
            if handler.path == late and server.seen[late] <= 3:
                handler.send_error(503)
            else:
                handler.answer()

        server.faults = itertools.repeat(away)
        place = f"data.path='{address(server, '/{000..015}.jsonl.zst')}'"
        quick = ["watchdog.step_seconds=5", "watchdog.heartbeat_seconds=0.3", "data.sequence_length=512"]
        result = run(small, tmp_path / "run", place, *quick, "engine=ddp", "engine.device=cpu", ranks=2)
    assert result.returncode == 0, result.stderr
    records = metrics(tmp_path / "run")
    assert sum(record["data/repeated_requests"] for record in records) == 3
    assert max(record["step_seconds"] for record in records) > 5
    assert [event["kind"] for event in read_events(tmp_path / "run")] == ["start", "finished"]


@pytest.mark.slow
def test_shards_that_are_made_meanwhile_give_the_same_losses_on_other_ranks(text: Path, tmp_path: Path) -> None:
    cached = ["data.cache_shards=true", "data.cache_workers=1", "data.workers=1"]
    whole = run(text, tmp_path / "whole", *cached, f"data.cache_dir={tmp_path / 'one'}")
    assert whole.returncode == 0, whole.stderr
    fresh = f"data.cache_dir={tmp_path / 'other'}"
    run_until_killed(text, tmp_path / "run", *cached, fresh)
    again = run(text, tmp_path / "run", *cached, fresh, "engine=ddp", "engine.device=cpu", ranks=2)
    assert again.returncode == 0, again.stderr
    assert "groups of shards are finished in" in again.stdout + again.stderr
    assert len(losses(tmp_path / "run")) == 24
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=2e-5, atol=0)


def test_it_ends_with_the_text(text: Path, tmp_path: Path) -> None:
    small = write_files(tmp_path / "text", [make_texts(9), make_texts(14, seed=1)])
    (small.parent / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    done = run(small, tmp_path / "run", "data.repeat=false", "training.total_steps=400")
    assert done.returncode == 0, done.stderr
    last = metrics(tmp_path / "run")[-1]["step"]
    assert 5 < last < 400
    assert f"the text ended after step {last}" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:08d}").is_dir()
    assert metrics(tmp_path / "run")[-1]["data/left_out_documents"] == 0


@pytest.mark.slow
def test_a_damaged_file_ends_the_run_with_the_reason(text: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text", [make_texts(40, seed=i) for i in range(4)])
    (folder.parent / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    file = folder / "002.jsonl.zst"
    file.write_bytes(file.read_bytes()[:-40])
    done = run(folder, tmp_path / "run", "data.workers=1")
    assert done.returncode == 1
    assert f"{file}: the zstd data is truncated" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tokenizer=null", "data.tokenizer=None: expected a tokenizer.json"),
        ("data.path=/nowhere", "data.path=/nowhere: there is no such file"),
        ("data.lanes=6", "data.lanes=6: expected null or a multiple of training.global_batch_size (4)"),
        ("data.shuffle_documents=-1", "data.shuffle_documents=-1: expected 0 or more"),
        ("data.network_retries=1000000", "data.network_retries=1000000: expected fewer, or a shorter"),
        ("data.network_timeout_seconds=1e300", "data.network_retries=8: expected fewer, or a shorter"),
        ("data.path=/nowhere/*.jsonl", "data.path /nowhere/*.jsonl: no such file or folder"),
        ("data.path=http://127.0.0.1:1/a.parquet", "read over the network are .txt, .jsonl"),
    ],
)
def test_a_mistake_is_one_line(text: Path, tmp_path: Path, override: str, said: str) -> None:
    done = run(text, tmp_path / "run", override)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rollback_that_a_kill_has_interrupted_passes_over_the_same_text(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start that carries it out reads the text of the steps that pass, to be where the lanes were."""

    def train(run_dir: Path, bad_steps: set[int]) -> None:
        overrides = command(text, run_dir, "training.total_steps=24", "checkpoint.interval_steps=5")[2:]
        more = ["checkpoint.keep_last=4", "guard.rollback_after=3", "guard.min_steps=4", "logging.wandb=disabled"]
        trainer = build_trainer(compose_config([*overrides, *more]))
        trainer.hooks = [Poison(bad_steps), *trainer.hooks]
        trainer.run()

    class Killed(Exception):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    train(tmp_path / "whole", {12, 13, 14})
    with monkeypatch.context() as patch:
        patch.setattr(RollbackHook, "_go_back", killed)
        with pytest.raises(Killed):
            train(tmp_path / "killed", {12, 13, 14})
    train(tmp_path / "killed", set())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    records = metrics(tmp_path / "killed")
    assert [record["step"] for record in records] == list(range(1, 25))
    assert [record["step"] for record in records if record["skipped"]] == [11, 12, 13, 14]


@pytest.mark.slow
def test_a_skip_names_the_documents_of_all_ranks(text: Path, tmp_path: Path) -> None:
    # So narrow that the noise of a healthy run is outside.
    narrow = ["guard.min_steps=2", "guard.deviations=1e-9", "guard.loss_rise=1e-9", "guard.rollback_after=0"]
    found = []
    for ranks, engine in ((1, []), (2, ["engine=ddp", "engine.device=cpu"])):
        result = run(text, tmp_path / str(ranks), *narrow, *engine, ranks=ranks)
        assert result.returncode == 0, result.stderr
        events = [event for event in read_events(tmp_path / str(ranks)) if event["kind"] == "skip"]
        found.append({event["step"]: event["documents"] for event in events})
        epochs = [record["epochs"] for record in metrics(tmp_path / str(ranks))]
        assert epochs == sorted(epochs)
        assert epochs[0] == 0
    both = found[0].keys() & found[1].keys()
    assert both
    assert all(found[0][step] == found[1][step] for step in both)
    assert all(sum(map(len, documents.values())) >= 4 for documents in found[1].values()), "of each row"


def test_files_that_were_written_since_are_named(text: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text", [make_texts(160, seed=i) for i in range(3)])
    (tmp_path / "tokenizer.json").write_bytes((text.parent / "tokenizer.json").read_bytes())
    config = compose_config(command(folder, tmp_path / "run", "training.total_steps=8")[2:])
    build_trainer(config).run()
    config.training.total_steps = 12
    build_trainer(config).run()
    assert "files rewritten" not in [event["kind"] for event in read_events(tmp_path / "run")]
    later = time.time() + 60
    for name in ("001", "002"):
        os.utime(folder / f"{name}.jsonl.zst", (later, later))
    for total_steps in (16, 20):  # said once
        config.training.total_steps = total_steps
        build_trainer(config).run()
    (event,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "files rewritten"]
    assert event["n_files"] == 2
    assert "001.jsonl.zst and 1 more have the size that the checkpoint knows and a later time" in event["text"]


def test_shards_of_a_mixture_are_made_meanwhile(text: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text", [make_texts(160, seed=3)])
    sources = [f"+data.sources.a={text}", f"+data.sources.b={folder}"]
    mixture = "data.mixture=[{from_step:0,weights:{a:3,b:1}},{from_step:6,weights:{b:1}}]"
    options = [option for option in command(text, tmp_path / "run")[2:] if not option.startswith("data.path=")]
    options += ["data.cache_shards=true", "data.cache_workers=1", f"data.cache_dir={tmp_path / 'cache'}"]
    options += [*sources, mixture, "schedule=constant"]
    found = []
    for starts in ([12], [5, 12]):
        run_dir = tmp_path / str(len(starts))
        for total_steps in starts:
            build_trainer(compose_config([*options, f"run_dir={run_dir}", f"training.total_steps={total_steps}"])).run()
        found.append(losses(run_dir))
    assert found[0] == found[1]
    assert {"epochs/a", "epochs/b"} <= metrics(tmp_path / "1")[-1].keys()
