"""wandb fails in five ways, the real one and its service: the same steps, and one line that says what happened."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mamba_train.checkpoint.storage import complete_steps
from tests.helpers import curve, environment, metrics, train, train_command

pytestmark = pytest.mark.slow

OVERRIDES = ("training.total_steps=200", "logging.ssm_health_interval_steps=1", "checkpoint.interval_steps=100")
CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple]:
    run_dir = tmp_path_factory.mktemp("untracked") / "run"
    assert train(run_dir, corpus, *OVERRIDES).returncode == 0
    return curve(run_dir)


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """A tracking server that knows nobody."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"errors":[{"message":"invalid API key"}]}')

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[None]:
    """run/wandb has 128 KiB, less than this run would write."""
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs a tmpfs, and only root may mount one")
    yield
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check(failure: str, expected: str, tmp_path: Path, corpus: Path, untracked: list[tuple], **env: str) -> None:
    command = train_command(tmp_path / "run", corpus, *OVERRIDES)[2:]
    command = [argument for argument in command if not argument.startswith("logging.wandb")]
    home = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    here = {key: value for key, value in environment().items() if not key.startswith("WANDB")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tracking.py")), failure, *command],
        cwd=corpus.parent,
        env={
            **here,
            **home,
            "WANDB_BASE_URL": CLOSED_PORT,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **env,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("wandb: ") and "goes on" in line]
    assert len(warnings) == 1, result.stdout
    assert expected in warnings[0]
    assert "Traceback" not in result.stderr
    assert curve(tmp_path / "run") == untracked
    assert complete_steps(tmp_path / "run" / "checkpoints")[0] == 200


def test_no_network(tmp_path: Path, corpus: Path, untracked: list[tuple]) -> None:
    check("none", "cannot start online", tmp_path, corpus, untracked, WANDB_API_KEY="x" * 40)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_bad_key(tmp_path: Path, corpus: Path, untracked: list[tuple], refusing_server: str) -> None:
    env = {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": refusing_server}
    check("none", "cannot start online", tmp_path, corpus, untracked, **env)


def test_a_crash_in_log(tmp_path: Path, corpus: Path, untracked: list[tuple]) -> None:
    check("crash", "tracking is off", tmp_path, corpus, untracked)


def test_a_hang(tmp_path: Path, corpus: Path, untracked: list[tuple]) -> None:
    check("hang", "it has not finished", tmp_path, corpus, untracked)


def test_a_full_disk(tmp_path: Path, corpus: Path, untracked: list[tuple], small_disk: None) -> None:
    check("none", "disk is full", tmp_path, corpus, untracked)


def test_metrics_that_cannot_be_written_from_the_start_are_one_line(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    result = train(tmp_path / "run", corpus, "training.total_steps=5")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "metrics.jsonl cannot be written (Is a directory)" in result.stderr.splitlines()[-1]


def test_steps_that_the_metrics_have_lost_are_counted(tmp_path: Path, corpus: Path) -> None:
    """Deleted or cut by hand: what follows is recorded, and nobody takes it for the whole."""
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[3:]))
    result = train(run_dir, corpus, "training.total_steps=6")
    assert result.returncode == 0, result.stderr
    assert f"warning: {run_dir}/metrics.jsonl has 2 of the 5 steps so far" in result.stdout
    assert [record["step"] for record in metrics(run_dir)] == [4, 5, 6]
