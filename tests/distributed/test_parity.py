"""One config under every engine: the same initial bits, the same data, the same loss curve."""

import shutil
from pathlib import Path

import pytest

from mamba_train.checkpoint import load
from tests.distributed.launch import TOPOLOGIES, SharedRuns, drive, losses, metric, notes

OTHERS = [name for name in TOPOLOGIES if name != "one"]
FAST = ("ddp x 2", "fsdp x 2")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OTHERS]
TOLERANCE = 2e-3


def skip_without(name: str) -> None:
    if "deepspeed" in str(TOPOLOGIES[name].overrides):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")


def global_rows(run_dir: Path) -> list[list[str]]:
    """Hashes of the rows of each global batch: those of all ranks, one after the other."""
    steps = zip(*(rank["rows"] for rank in notes(run_dir)), strict=True)
    return [[row for of_rank in step for row in of_rank] for step in steps]


@pytest.mark.parametrize("name", EACH)
def test_the_same_run_under_every_engine(runs: SharedRuns, name: str) -> None:
    skip_without(name)
    one, other = runs.get("one"), runs.get(name)
    assert len(notes(other)) == TOPOLOGIES[name].processes
    for rank in notes(other):
        assert rank["start"] == notes(one)[0]["start"], "initial weights differ"
    assert global_rows(other) == global_rows(one)
    expected, found = losses(one), losses(other)
    assert len(found) == len(expected) == 30
    assert found[-1] < found[0] - 1.0, "the loss must fall for the comparison to mean something"
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < TOLERANCE
    # Adam does not see the scale of a gradient, so a mean in the place of a sum would not show in the losses.
    assert metric(other, "grad_norm") == pytest.approx(metric(one, "grad_norm"), rel=1e-3)
    assert metric(other, "validation/loss") == pytest.approx(metric(one, "validation/loss"), rel=1e-5)


HYBRID = (
    "model.mixer=mamba2",
    "model.head_dim=8",
    "model.attention_layers=[1]",
    "model.attention_heads=4",
    "model.attention_d_conv=3",
    "model.d_intermediate=40",
    "model.tie_embeddings=false",
    "training.total_steps=15",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp x 4", "zero-2 x 2", "zero-3 x 2"])
def test_mamba2_attention_and_mlps_too(texts: Path, tmp_path: Path, name: str) -> None:
    skip_without(name)
    for topology, run_dir in (("one", tmp_path / "one"), (name, tmp_path / "other")):
        result = drive(TOPOLOGIES[topology], texts, run_dir, *HYBRID)
        assert result.returncode == 0, result.stderr[-4000:]
    assert notes(tmp_path / "one")[0]["start"] == notes(tmp_path / "other")[1]["start"]
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "other")
    assert found[-1] < found[0] - 0.5
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < TOLERANCE


@pytest.mark.slow
def test_swapped_ranks_are_noticed(runs: SharedRuns, texts: Path, tmp_path: Path) -> None:
    """The sum over the ranks does not see which rank had which rows; the comparison of the rows does."""
    short = ("training.total_steps=2", "schedule.warmup_steps=1")
    result = drive(TOPOLOGIES["ddp x 2"], texts, tmp_path / "run", *short, options=["--swap"])
    assert result.returncode == 0, result.stderr[-4000:]
    swapped, right = global_rows(tmp_path / "run"), global_rows(runs.get("one"))[:2]
    assert swapped != right
    assert [sorted(rows) for rows in swapped] == [sorted(rows) for rows in right]


RESUMES = [
    (writer, reader)
    for writer in ("one", "fsdp x 4", "zero-3 x 2")
    for reader in ("fsdp x 2", "zero-1 x 2", "zero-2 x 4", "one", writer)
]


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), dict.fromkeys(RESUMES))
def test_any_engine_resumes_what_any_wrote(
    runs: SharedRuns, texts: Path, tmp_path: Path, writer: str, reader: str
) -> None:
    skip_without(writer)
    skip_without(reader)
    whole, run_dir = runs.get(writer), tmp_path / "run"
    checkpoint = whole / "checkpoints" / "step_00000015"
    shutil.copytree(checkpoint, run_dir / "checkpoints" / checkpoint.name)
    result = drive(TOPOLOGIES[reader], texts, run_dir, options=["--no-pickle"])
    assert result.returncode == 0, result.stderr[-4000:]
    check_start(run_dir, checkpoint)
    expected, found = losses(whole)[15:], losses(run_dir)
    if writer == reader:
        assert found == expected
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < TOLERANCE
    ours, theirs = (load(folder / "checkpoints" / "step_00000030") for folder in (run_dir, whole))
    for key, moment in theirs.optimizer.items():
        difference = float((ours.optimizer[key] - moment).norm())
        assert difference <= (0 if writer == reader else 1e-2 * float(moment.norm()) + 1e-7), key


def check_start(run_dir: Path, checkpoint: Path) -> None:
    """Every rank began with the weights, moments and step counts of the checkpoint, bit by bit."""
    from tests.distributed.driver import digest

    saved = load(checkpoint)
    expected = {name: digest(tensor) for name, tensor in {**saved.model, **saved.optimizer}.items()}
    assert any(name.endswith(".exp_avg_sq") for name in expected)
    for rank in notes(run_dir):
        assert rank["start"] == expected


def test_the_guard_against_pickle_bites() -> None:
    import pickle

    from tests.distributed.driver import forbid_pickle

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            patch.setattr(pickle, name, getattr(pickle, name))
        import torch

        patch.setattr(torch, "load", torch.load)
        patch.setattr(torch.distributed.distributed_c10d, "_unpickler", torch.distributed.distributed_c10d._unpickler)
        forbid_pickle()
        with pytest.raises(AssertionError, match="UNPICKLED"):
            pickle.loads(b"")
