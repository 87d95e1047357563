"""Settings that every test shares."""

import os
import random
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest

# Tracking of test runs concerns nobody; the tests of the sink itself set their own mode.
os.environ["WANDB_MODE"] = "disabled"
# Under pytest-xdist each process gets one core: more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


# How long an example takes, or to draw it, says something about the machine only.
hypothesis.settings.register_profile(
    "no-deadline", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no-deadline")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers each time; on a GPU fresh ones, and a failure shows their seed."""
    if "torch" not in sys.modules:
        return
    import torch

    seed = zlib.crc32(request.node.nodeid.encode())
    if "gpu" in request.path.parts:
        seed = int(os.environ.get("MAMBA_TRAIN_TEST_SEED", random.SystemRandom().getrandbits(32)))
        print(f"MAMBA_TRAIN_TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small real texts."""
    from tests.helpers import write_corpus

    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")
