import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data.corpus import Corpus
from tests.data.folders import write_folder
from tests.data.pile_documents import stdlib_documents
from tests.data.streams import write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = [
    "state", "space", "model", "scan", "selective", "convolution", "gate", "token", "loss", "gradient",
    "naïve", "日本語", "🐍", "return", "self", "def", "for", "in", "range", "x", "=", "(", ")", ":", "\n    ", "\n",
]  # fmt: skip


@pytest.fixture
def materials() -> Path:
    folder = Path(os.environ.get("MAMBA_TRAIN_MATERIALS", REPOSITORY.parent / "shared" / "materials"))
    if not folder.is_dir():
        pytest.skip("the materials folder is not here (MAMBA_TRAIN_MATERIALS)")
    return folder


def make_texts(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """Distinct texts of real-looking words, some of them not ASCII."""
    generator = random.Random(seed)
    return [f"document {i}: " + " ".join(generator.choices(WORDS, k=generator.randint(1, 2 * words))) for i in range(n)]


@pytest.fixture
def jsonl_folder(tmp_path: Path) -> Path:
    """Two files of 300 documents in all."""
    folder = tmp_path / "text"
    folder.mkdir()
    texts = make_texts(300)
    for name, part in (("a.jsonl", texts[:100]), ("b.jsonl", texts[100:])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def local_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A config that reads a path with a small vocabulary."""

    def make(path: Path | str | None, **changes: Any) -> DataConfig:
        settings: dict[str, Any] = {
            "name": "local",
            "source": DataSource.local,
            "path": None if path is None else str(path),
            "vocab_size": 400,
            "cache_dir": str(tmp_path / "cache"),
        }
        return DataConfig(**{**settings, **changes})

    return make


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """A corpus of given shards, each a list of documents (ids without their end-of-document token 0)."""

    def make(shards: list[list[list[int]]], vocab_size: int = 60_000) -> Corpus:
        folder = tmp_path / f"corpus-{len(list(tmp_path.iterdir()))}"
        write_folder(folder, {"train": [("", documents) for documents in shards]}, vocab_size)
        return Corpus.open(folder, "train")

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real documents, small ones."""
    return [text[:600] for found in stdlib_documents().values() for text in found][:700]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A small tokenizer of them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path, texts[::5])
    return path
