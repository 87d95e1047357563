import enum
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mamba_train.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    complete_steps,
    load,
    load_model_only,
    newest_complete,
    save,
    storage,
    verify,
)
from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.checkpoint.storage import load_pieces, model_shapes
from mamba_train.checkpoint.tensors import read_pieces, read_tensors, write_pieces


def test_everything_comes_back(folder, make_checkpoint, assert_same):
    path = save(folder, make_checkpoint(500), reserve_gib=0)
    assert path == folder / "step_00000500"
    assert verify(path) == []
    assert_same(load(path), make_checkpoint(500))


def test_the_layout_on_disk(folder, make_checkpoint):
    path = save(folder, make_checkpoint(500), reserve_gib=0)
    files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    tensors = [f"{group}/rank_00000.safetensors" for group in ("model", "optimizer", "rng")]
    assert files == ["config.yaml", "manifest.json", *tensors, "state.json"]
    with safe_open(path / "optimizer" / "rank_00000.safetensors", framework="pt") as file:
        assert "embedding.weight.exp_avg_sq" in file.keys()  # noqa: SIM118
    assert json.loads((path / "state.json").read_text())["tokens"] == 2**40 + 500
    assert yaml.safe_load((path / "config.yaml").read_text())["model"] == {"d_model": 32, "dt_rank": None}
    modes = {p.stat().st_mode for p in path.rglob("*") if p.is_file()}
    assert len(modes) == 1, "tensor files have the permissions of the others"


def test_tensors_do_not_change_with_the_file(folder, make_checkpoint, assert_same):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    loaded = load(path)
    for file in path.rglob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(loaded, make_checkpoint(1))


def split(pieces: Mapping[str, Piece], cuts: Sequence[float]) -> list[dict[str, Piece]]:
    """What ranks would hold whose ranges end at these shares of each tensor."""
    ranks = []
    for low, high in pairwise((0.0, *cuts, 1.0)):
        ranks.append({})
        for name, piece in pieces.items():
            start, end = (round(share * piece.values.numel()) for share in (low, high))
            ranks[-1][name] = Piece(piece.shape, start, piece.values[start:end])
    return ranks


def save_from_ranks(folder, checkpoint, monkeypatch, cuts=(), twice=False):
    """Save as ranks would that each hold a part of every tensor."""

    def write(place, rank, pieces):
        ranks = split(pieces, () if place.name == "rng" else cuts)
        paths = [path for rank, parts in enumerate(ranks) for path in write_pieces(place, rank, parts)]
        return [*paths, *(write_pieces(place, len(ranks), pieces) if twice else [])]

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_pieces", write)
        return save(folder, checkpoint, reserve_gib=0)


@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.5, 0.75), (0.1, 0.11, 0.8), (1 / 3, 2 / 3)])
def test_the_files_of_several_ranks_are_read_together(folder, make_checkpoint, assert_same, monkeypatch, cuts):
    path = save_from_ranks(folder, make_checkpoint(1), monkeypatch, cuts)
    assert len(list((path / "model").iterdir())) > len(cuts)
    assert_same(load(path), make_checkpoint(1))
    assert model_shapes(path) == {name: tuple(t.shape) for name, t in make_checkpoint(1).model.items()}


def test_the_same_block_in_two_files_is_an_error(folder, make_checkpoint, monkeypatch):
    path = save_from_ranks(folder, make_checkpoint(1), monkeypatch, twice=True)
    with pytest.raises(DamagedCheckpoint, match=r"is there twice in the files of .*model"):
        load(path)


def test_a_missing_block_is_an_error(folder, make_checkpoint, monkeypatch):
    path = save_from_ranks(folder, make_checkpoint(1), monkeypatch, (0.3, 0.6))
    files = sorted((path / "model").glob("rank_00001*"))
    assert files
    kept = [file for file in (path / "model").iterdir() if file not in files]
    with pytest.raises(ValueError, match="is not complete"):
        read_tensors(kept)


@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 6),
    written=st.lists(st.floats(0, 1), max_size=4),
    wanted=st.lists(st.floats(0, 1), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_cut_it_any_other_cut_reads_it(tmp_path_factory, rows, width, written, wanted):
    folder = tmp_path_factory.mktemp("cuts")
    tensors = {
        "matrix": torch.arange(rows * width, dtype=torch.float32).view(rows, width),
        "vector": torch.arange(rows * 3, dtype=torch.float64),
    }
    pieces = {name: Piece.whole(tensor) for name, tensor in tensors.items()}
    ranks = split(pieces, sorted(written))
    files = [path for rank, parts in enumerate(ranks) for path in write_pieces(folder, rank, parts)]
    found = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
    for parts in split({name: Piece.whole(tensor) for name, tensor in found.items()}, sorted(wanted)):
        read_pieces(files, parts)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (Pieces({"v": Piece.whole(torch.ones(4))}), r"there is no tensor 'v' in the files of .*model"),
        (Pieces({"w": Piece.whole(torch.ones(4))}), r"'w' has shape \(2, 2\), expected \(4,\)"),
        (Pieces({}, {"w.exp_avg": Piece.whole(torch.ones(4))}), r"there is no tensor 'w.exp_avg' in the files of"),
    ],
)
def test_what_a_checkpoint_does_not_have_is_named(folder, pieces, message):
    path = save(folder, Checkpoint(1, {"w": torch.ones(2, 2)}), reserve_gib=0)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint .*step_00000001 cannot be loaded: {message}"):
        load_pieces(path, pieces)


def test_model_only(folder, make_checkpoint):
    path = save(folder, make_checkpoint(7), reserve_gib=0)
    (path / "optimizer" / "rank_00000.safetensors").unlink()
    (path / "state.json").write_text("")
    model, config = load_model_only(path)
    assert model.keys() == make_checkpoint(7).model.keys()
    assert config == make_checkpoint(7).config
    (path / "model" / "rank_00000.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedCheckpoint, match=r"model/rank_00000.safetensors: 1 bytes"):
        load_model_only(path)


def test_torch_distributed_reads_the_same_layout(folder, make_checkpoint):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    path = save(folder, make_checkpoint(3), reserve_gib=0)
    expected = make_checkpoint(3).model
    del expected["blocks.0.D"]  # NaN compares unequal to itself
    found = {name: torch.zeros_like(tensor.detach()) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path / "model")), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_nothing_is_pickled(folder, make_checkpoint, assert_same, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, forbidden)
    save(folder, make_checkpoint(1), reserve_gib=0)
    path = newest_complete(folder, pytest.fail)
    assert path is not None
    assert_same(load(path), make_checkpoint(1))


def test_saving_a_step_again_replaces_it(folder, make_checkpoint, assert_same):
    for seed in (0, 1):
        path = save(folder, make_checkpoint(5, seed=seed), reserve_gib=0)
    assert_same(load(path), make_checkpoint(5, seed=1))
    assert [p.name for p in folder.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("leave", ["nothing", "half", "file"])
def test_saving_over_a_broken_folder(folder, make_checkpoint, assert_same, leave):
    target = folder / "step_00000005"
    folder.mkdir(parents=True)
    if leave == "file":
        target.write_text("not a folder")
    else:
        target.mkdir()
    if leave == "half":
        (target / "model").mkdir()
        (target / "model" / "rank_00000.safetensors").write_bytes(b"half")
    assert complete_steps(folder) == []
    assert_same(load(save(folder, make_checkpoint(5), reserve_gib=0)), make_checkpoint(5))
    assert newest_complete(folder, pytest.fail) == target


def test_every_byte_is_on_the_disk_before_the_name_is(folder, make_checkpoint, monkeypatch):
    """A power cut may lose whatever was not flushed, so all flushes come before the rename."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(source, target):
        rename(source, target)
        content = {str(path).replace(str(target), str(source)) for path in (target, *target.rglob("*"))}
        flushed = {path for event, path in events if event == "fsync"}
        assert content <= flushed, f"not flushed: {sorted(content - flushed)}"
        events.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    assert events[-2:] == [("rename", str(path)), ("fsync", str(folder))]


def test_the_manifest_is_the_last_file(folder, make_checkpoint, monkeypatch):
    from mamba_train.checkpoint import storage

    seen = []

    def look(path, text):
        seen.append((path.name, sorted(p.name for p in path.parent.rglob("*") if p.is_file())))
        write_text(path, text)

    write_text = storage._write_text
    monkeypatch.setattr(storage, "_write_text", look)
    save(folder, make_checkpoint(1), reserve_gib=0)
    assert seen[-1] == ("manifest.json", ["config.yaml", *["rank_00000.safetensors"] * 3, "state.json"])


def test_a_failed_save_leaves_nothing(folder, make_checkpoint, monkeypatch):
    from mamba_train.checkpoint import storage

    save(folder, make_checkpoint(1), reserve_gib=0)
    monkeypatch.setattr(storage, "describe_files", lambda folder, paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(folder, make_checkpoint(2), reserve_gib=0)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]


class _Kind(enum.StrEnum):
    cosine = "cosine"


def test_enums_and_tuples_are_stored_as_plain_values(folder):
    checkpoint = Checkpoint(1, {"w": torch.ones(2)}, config={"kind": _Kind.cosine, "betas": (0.9, 0.95)})
    found = load(save(folder, checkpoint, reserve_gib=0))
    assert found.config == {"kind": "cosine", "betas": [0.9, 0.95]}
    assert type(found.config["kind"]) is str


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused_before_anything_is_written(folder, value):
    with pytest.raises(ValueError, match="step 1 is not plain JSON"):
        save(folder, Checkpoint(1, {"w": torch.ones(2)}, state={"when": value}), reserve_gib=0)
    assert not folder.exists()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=4), st.dictionaries(st.text(), values, max_size=4))
def test_any_json_comes_back_as_state_and_config(tmp_path_factory, state, config):
    folder = tmp_path_factory.mktemp("json")
    checkpoint = Checkpoint(1, {"w": torch.ones(2)}, state=state, config=config)
    found = load(save(folder, checkpoint, reserve_gib=0))
    assert found.state == state
    assert found.config == config


def _tied():
    weight = torch.ones(4, 4)
    return {"a.weight": weight, "b": torch.ones(2), "head.weight": weight}


def _overlapping():
    flat = torch.ones(100)
    return {"large": flat[:80], "small": flat[10:20]}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_tied, r"model tensors 'a.weight' and 'head.weight' share memory"),
        (_overlapping, r"model tensors 'large' and 'small' share memory"),
        (lambda: {"w": torch.ones(4, 3).t()}, r"model tensor 'w' \(3, 4\) is not contiguous"),
        (lambda: {"w": torch.empty(2, device="meta")}, r"model tensor 'w' is on the meta device"),
        (lambda: {"w": 3.0}, r"model tensor 'w' must be a dense torch.Tensor, got float"),
        (lambda: {"w": torch.eye(3).to_sparse()}, r"model tensor 'w' must be a dense torch.Tensor"),
    ],
)
def test_tensors_that_a_file_cannot_hold_are_refused_by_name(folder, tensors, message):
    with pytest.raises(ValueError, match=message):
        save(folder, Checkpoint(1, tensors()), reserve_gib=0)
    assert not folder.exists()


def test_neighbouring_slices_of_one_buffer_are_fine(folder):
    flat = torch.arange(100.0)
    found = load(save(folder, Checkpoint(1, {"a": flat[:40], "b": flat[40:]}), reserve_gib=0))
    assert torch.equal(torch.cat([found.model["a"], found.model["b"]]), flat)
