"""`data=shards`: a folder that is there is checked, used where it is, and left alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data.manifest import read_manifest
from mamba_train.data.prepare import prepare

MakeConfig = Callable[..., DataConfig]


def ignore(line: str) -> None:
    pass


def test_finished_shards_are_used_where_they_are(local_config: MakeConfig, jsonl_folder: Path) -> None:
    folder = prepare(local_config(jsonl_folder), ignore)
    shards = local_config(folder, source=DataSource.shards)
    assert prepare(shards, ignore) == folder
    assert prepare(local_config(folder, source=DataSource.shards, tokenizer=f"{folder}/tokenizer.json"), ignore)


def test_damaged_shards_stop_the_run_and_are_left_alone(local_config: MakeConfig, jsonl_folder: Path) -> None:
    folder = prepare(local_config(jsonl_folder), ignore)
    path = folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    assert prepare(local_config(folder, source=DataSource.shards), ignore) == folder  # sizes alone say nothing
    with pytest.raises(ValueError, match=r"data\.path=.*train-00000\.bin was changed"):
        prepare(local_config(folder, source=DataSource.shards, check_hashes=True), ignore)
    path.write_bytes(bytes(data[:-2]))
    with pytest.raises(ValueError, match=r"data\.path=.*train-00000\.bin has \d+ bytes instead of"):
        prepare(local_config(folder, source=DataSource.shards), ignore)
    assert path.read_bytes() == data[:-2]


def test_finished_shards_with_another_tokenizer(local_config: MakeConfig, jsonl_folder: Path, tmp_path: Path) -> None:
    folder = prepare(local_config(jsonl_folder), ignore)
    other = tmp_path / "other.json"
    other.write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*other\.json: the shards .* another tokenizer"):
        prepare(local_config(folder, source=DataSource.shards, tokenizer=str(other)), ignore)


def test_a_changed_label_changes_the_fingerprint(local_config: MakeConfig, jsonl_folder: Path) -> None:
    manifest = read_manifest(prepare(local_config(jsonl_folder), ignore))
    shards = {**manifest.shards, "train": [dataclasses.replace(manifest.shards["train"][0], label="Books")]}
    assert dataclasses.replace(manifest, shards=shards).fingerprint != manifest.fingerprint
