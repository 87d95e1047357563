"""Killed at any instant and started again, a run ends as if it had never been killed."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_train.checkpoint.storage import complete_steps
from tests.helpers import REPOSITORY, curve, environment, metrics, train, train_command

TOTAL_STEPS = 40
SAVE_INTERVAL = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(run_dir, corpus, f"training.total_steps={TOTAL_STEPS}")
    assert result.returncode == 0, result.stderr
    found = curve(run_dir)
    assert [point[0] for point in found] == list(range(1, TOTAL_STEPS + 1))
    assert found[-1][2] < found[0][2] - 1.0, "the loss must fall for the comparison to mean something"
    return found


def run_and_die(where: str, value: float, run_dir: Path, corpus: Path) -> bool:
    """A start that is killed there (dying.py); False when it ended before."""
    overrides = train_command(run_dir, corpus, f"training.total_steps={TOTAL_STEPS}")[2:]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dying.py")), where, str(value), *overrides],
        cwd=corpus.parent,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_against(undisturbed: list[tuple], run_dir: Path, corpus: Path) -> None:
    assert train(run_dir, corpus, f"training.total_steps={TOTAL_STEPS}").returncode == 0
    assert curve(run_dir) == undisturbed


def run_with_kills(run_dir: Path, corpus: Path, n_kills: int, seed: int) -> int:
    """Kill at random steps and at random writes of a checkpoint; return how many kills hit."""
    generator = random.Random(seed)
    checkpoints = run_dir / "checkpoints"
    hits = 0
    for number in range(n_kills):
        reached = max(complete_steps(checkpoints), default=0) if checkpoints.exists() else 0
        if reached >= TOTAL_STEPS - SAVE_INTERVAL:
            break
        if number % 2:
            hits += run_and_die("save", generator.uniform(0, 0.02), run_dir, corpus)
        else:
            hits += run_and_die("step", reached + generator.randint(1, SAVE_INTERVAL + 2), run_dir, corpus)
        # No more than the steps since the last finished save are lost. The training goes on while one is written, but
        # does not begin the next one before it is finished.
        saved = max(complete_steps(checkpoints), default=0) if checkpoints.exists() else 0
        assert last_step(run_dir) - saved <= 2 * SAVE_INTERVAL
    return hits


def test_killed_runs_end_bit_equal(tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    run_dir = tmp_path / "run"
    assert run_with_kills(run_dir, corpus, n_kills=4, seed=0) >= 3
    check_against(undisturbed, run_dir, corpus)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_runs_end_bit_equal_many_times(
    tmp_path: Path, corpus: Path, undisturbed: list[tuple], seed: int
) -> None:
    run_dir = tmp_path / "run"
    assert run_with_kills(run_dir, corpus, n_kills=6, seed=seed) >= 4
    check_against(undisturbed, run_dir, corpus)


def test_two_resumes_in_a_row_and_the_cut_lines(tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    run_dir = tmp_path / "run"
    assert run_and_die("step", 13, run_dir, corpus)
    seen_by_the_first = {record["step"] for record in metrics_so_far(run_dir)}
    assert run_and_die("step", 23, run_dir, corpus)
    check_against(undisturbed, run_dir, corpus)
    cut = sorted(run_dir.glob("metrics.cut-*.jsonl"))
    assert cut, "the steps that were done twice are kept aside"
    assert max(seen_by_the_first) >= 13


def metrics_so_far(run_dir: Path) -> list[dict]:
    """As `metrics`, but a torn last line is left out."""
    text = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(text[: text.rfind("\n") + 1])
    return metrics(run_dir)


def test_another_seed_is_refused_and_a_longer_run_goes_on(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=10").returncode == 0
    refused = train(run_dir, corpus, "training.total_steps=20", "seed=1")
    assert refused.returncode == 2
    assert "seed" in refused.stderr
    longer = train(run_dir, corpus, "training.total_steps=20")
    assert longer.returncode == 0
    assert "resuming after step 10" in longer.stdout
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 21))
    again = train(run_dir, corpus, "training.total_steps=20")
    assert again.returncode == 0
    assert "already reached step 20" in again.stdout
    assert len(metrics(run_dir)) == 20


def test_a_resume_unpickles_nothing(tmp_path: Path, corpus: Path) -> None:
    """`pickle.load` and its relatives are made to raise in the process that resumes."""
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import pickle\n"
        "class Refused(pickle._Unpickler):\n"
        "    def load(self): raise RuntimeError('UNPICKLED')\n"
        "def refuse(*a, **k): raise RuntimeError('UNPICKLED')\n"
        "pickle.load = pickle.loads = refuse\n"
        "pickle.Unpickler = pickle._Unpickler = Refused\n"
    )
    command = train_command(run_dir, corpus, "training.total_steps=10")
    path = os.pathsep.join([str(guard), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, cwd=corpus.parent, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "resuming after step 5" in result.stdout
    # The guard does bite: the same process cannot load what torch.save wrote.
    bites = subprocess.run(
        [command[0], "-c", "import pickle; pickle.loads(pickle.dumps(1))"],
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "UNPICKLED" in bites.stderr


def test_micro_batches_do_not_change_the_curve(tmp_path: Path, corpus: Path, undisturbed: list[tuple]) -> None:
    """The data order is that of the global batch; losses differ by rounding only."""
    run_dir = tmp_path / "run"
    result = train(run_dir, corpus, f"training.total_steps={TOTAL_STEPS}", "training.micro_batch_size=4")
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(curve(run_dir), undisturbed, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-3)
