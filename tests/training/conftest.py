"""Prepared folders that several tests here train on."""

from pathlib import Path

import pytest

from mamba_train.data.tokenizer import TextTokenizer, train_tokenizer
from tests.data.folders import write_text_folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> TextTokenizer:
    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300)


@pytest.fixture
def folders(tmp_path: Path, corpus: Path, tokenizer: TextTokenizer) -> dict[str, Path]:
    """Two sources, one of two domains with something held out of each, one without labels."""
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    code = [("Easy (a)", texts[0::4]), ("Hard", texts[1::4])]
    held_out = [("Easy (a)", texts[2:40:4]), ("Hard", texts[42:80:4])]
    return {
        "code": write_text_folder(tmp_path / "code", {"train": code, "validation": held_out}, tokenizer),
        "prose": write_text_folder(tmp_path / "prose", {"train": [("", texts[3::4])]}, tokenizer),
    }
