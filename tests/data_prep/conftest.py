import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mamba_train.data.tokenizer import END_OF_DOCUMENT, train_tokenizer
from tests.data.conftest import WORDS
from tests.data_prep.helpers import Row

LABELS = ["Pile-CC", "Wikipedia (en)", "ArXiv"]


@pytest.fixture
def materials() -> Path:
    folder = Path(os.environ.get("MAMBA_TRAIN_MATERIALS", Path(__file__).resolve().parents[3] / "shared" / "materials"))
    if not folder.is_dir():
        pytest.skip("the materials folder is not here (MAMBA_TRAIN_MATERIALS)")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer([" ".join(WORDS) * 20], 400).serialised)
    return path


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Documents in the Pile's form, some with what has gone wrong elsewhere."""
    generator = random.Random(seed)
    rows = []
    for i in range(n):
        text = f"document {seed}-{i}: " + " ".join(generator.choices(WORDS, k=generator.randint(1, 100)))
        if i % 7 == 0:
            text += f" {END_OF_DOCUMENT} is only a word here{END_OF_DOCUMENT}"
        if i % 11 == 0:
            text = "x"
        rows.append((text, generator.choice(LABELS)))
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": label}}) + "\n" for text, label in rows]
    data = "".join(lines).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


@pytest.fixture
def pile(tmp_path: Path) -> Callable[..., dict[str, list[Row]]]:
    """Writes a small corpus in the Pile's form below tmp_path / "raw"; returns its rows by file name."""

    def write(n_files: int = 5, n_rows: int = 40) -> dict[str, list[Row]]:
        files = {f"train/{i:02d}.jsonl.zst": make_rows(n_rows, i) for i in range(n_files)}
        files["val.jsonl.zst"] = make_rows(10, 99)
        for name, rows in files.items():
            write_rows(tmp_path / "raw" / name, rows)
        return files

    return write
