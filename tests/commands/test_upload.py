"""`mamba-train upload`: what was recorded without a network arrives at wandb later, each step once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, environment, metrics, train_command
from tests.monitor.wandb_server import wandb_server


def upload(run_dir: Path, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    here = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config"), "HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-m", "mamba_train", "upload", str(run_dir)],
        cwd=REPOSITORY,
        env={**here, **home, "WANDB_BASE_URL": "http://127.0.0.1:9", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def train_offline(run_dir: Path, corpus: Path, n_steps: int, step_to_die_at: int | None = None) -> None:
    """Train offline; with step_to_die_at, killed there with what it has written so far."""
    overrides = (f"training.total_steps={n_steps}", "schedule=constant", "logging.wandb=offline")
    process = subprocess.Popen(
        train_command(run_dir, corpus, *overrides), cwd=corpus.parent, env=environment(), stdout=subprocess.DEVNULL
    )
    if step_to_die_at is None:
        assert process.wait(120) == 0
        return
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < step_to_die_at:
        assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.slow
def test_each_step_arrives_once_also_those_of_a_start_that_was_killed(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    train_offline(run_dir, corpus, 2000, step_to_die_at=23)
    with wandb_server() as server:
        there = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "x" * 40}
        first = upload(run_dir, tmp_path, **there)
        assert first.returncode == 0, first.stderr
        n_uploaded = len(metrics(run_dir))
        assert f"{n_uploaded} steps uploaded to {server.address}/someone/project/runs/" in first.stdout
        train_offline(run_dir, corpus, n_uploaded + 20)
        assert "20 steps uploaded" in upload(run_dir, tmp_path, **there).stdout
        assert "0 steps uploaded" in upload(run_dir, tmp_path, **there).stdout
        [history] = server.histories.values()
    assert [record["step"] for record in history] == list(range(1, n_uploaded + 21))
    assert [record["loss"] for record in history[n_uploaded:]] == [r["loss"] for r in metrics(run_dir)[n_uploaded:]]
    [run_id] = server.histories
    assert all(folder.name.endswith(run_id) for folder in (run_dir / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_what_cannot_be_uploaded_is_one_clear_line(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    train_offline(run_dir, corpus, 5)
    for folder, env, expected in (
        (tmp_path, {}, "expected the folder of a run with a complete checkpoint"),
        (run_dir, {}, "not logged in; run `wandb login` first"),
        (run_dir, {"WANDB_API_KEY": "x" * 40}, "wandb: CommError"),  # nobody listens at that address
    ):
        refused = upload(folder, tmp_path, **env)
        assert refused.returncode == 2, refused.stderr
        *others, last = refused.stderr.splitlines()
        assert last.startswith("error: ")
        assert expected in last
        assert all(line.startswith("wandb: ") for line in others)
