import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_train.checkpoint import DamagedCheckpoint, complete_steps, load, newest_complete, save, verify
from mamba_train.checkpoint.manifest import parse

FILES = [
    "manifest.json",
    "model/rank_00000.safetensors",
    "optimizer/rank_00000.safetensors",
    "rng/rank_00000.safetensors",
    "state.json",
    "config.yaml",
]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x04
    path.write_bytes(data)


def _remove(path: Path) -> None:
    path.unlink()


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _remove, _lengthen])
def test_a_damaged_checkpoint_is_passed_over_loudly(folder, make_checkpoint, assert_same, name, damage):
    for step in (100, 200):
        save(folder, make_checkpoint(step), reserve_gib=0)
    damage(folder / "step_00000200" / name)
    lines: list[str] = []
    chosen = newest_complete(folder, lines.append)
    assert chosen == folder / "step_00000100"
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert name in lines[0]
    assert "step_00000200 is damaged" in lines[0]
    assert "step_00000100 is used instead" in lines[0]
    assert_same(load(chosen), make_checkpoint(100))
    with pytest.raises(DamagedCheckpoint, match=f"step_00000200 cannot be loaded: {name}"):
        load(folder / "step_00000200")


def test_several_damaged_ones_are_each_reported(folder, make_checkpoint):
    for step in (1, 2, 3):
        save(folder, make_checkpoint(step), reserve_gib=0)
    _flip(folder / "step_00000003" / "state.json")
    _truncate(folder / "step_00000002" / "manifest.json")
    lines: list[str] = []
    assert newest_complete(folder, lines.append) == folder / "step_00000001"
    assert len(lines) == 2
    _remove(folder / "step_00000001" / "manifest.json")
    lines.clear()
    assert newest_complete(folder, lines.append) is None
    assert len(lines) == 3
    assert all("there is no complete checkpoint to use instead" in line for line in lines)


def test_no_checkpoint_is_no_news(folder):
    assert newest_complete(folder, pytest.fail) is None
    assert complete_steps(folder) == []


def test_any_changed_byte_of_any_file_is_found(folder, make_checkpoint, tmp_path):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    copy = tmp_path / "step_00000001"
    shutil.copytree(path, copy)
    assert verify(copy) == []
    sizes = {name: (path / name).stat().st_size for name in FILES}

    @settings(
        max_examples=300,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.sampled_from(FILES), st.integers(0, 2**30), st.integers(1, 255))
    def check(name, position, change):
        data = bytearray((path / name).read_bytes())
        data[position % sizes[name]] ^= change
        (copy / name).write_bytes(data)
        problems = verify(copy)
        (copy / name).write_bytes((path / name).read_bytes())
        assert len(problems) == 1
        assert problems[0].startswith(f"{name}: ")

    check()


def test_every_byte_of_the_manifest_counts(folder, make_checkpoint):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    original = (path / "manifest.json").read_bytes()
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 0x20 if original[position : position + 1].isalnum() else 0x01
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: "):
            parse(bytes(data))


def test_files_that_are_not_part_of_it_do_no_harm(folder, make_checkpoint, assert_same):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    (path / "model" / ".nfs0001").write_bytes(b"left by the filesystem")
    (path / "model" / "rank_00001.safetensors").write_bytes(b"not in the manifest")
    assert verify(path) == []
    assert_same(load(path), make_checkpoint(1))


def test_a_checkpoint_under_another_step_is_damaged(folder, make_checkpoint):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    path.rename(folder / "step_00000900")
    lines: list[str] = []
    assert newest_complete(folder, lines.append) is None
    assert "of step 1, in a folder named step_00000900" in lines[0]


def test_a_newer_format_says_so(folder, make_checkpoint):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert verify(path) == ["manifest.json: format version 2, this program reads version 1"]


@pytest.mark.parametrize("text", ["", "[]", "null", "7", '{"format_version": 1}', "{", "\x00", '"a"'])
def test_nonsense_instead_of_a_manifest(folder, make_checkpoint, text):
    path = save(folder, make_checkpoint(1), reserve_gib=0)
    (path / "manifest.json").write_text(text)
    assert verify(path)[0].startswith("manifest.json: ")


def test_the_quick_look_sees_truncation(folder, make_checkpoint):
    for step in (1, 2, 3):
        save(folder, make_checkpoint(step), reserve_gib=0)
    _truncate(folder / "step_00000002" / "model" / "rank_00000.safetensors")
    assert complete_steps(folder) == [3, 1]
