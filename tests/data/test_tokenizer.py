import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_train.data import tokenizer as module
from mamba_train.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, dna_tokenizer, load_tokenizer, train_tokenizer

TEXTS = [f"def function_{i}(self, x):\n    return self.state[{i}] + x\n" * 5 for i in range(50)]
TRAIN = f"""
from mamba_train.data.tokenizer import train_tokenizer
print(train_tokenizer({TEXTS!r}, 320).sha256)
"""


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, 320)


def changed(tokenizer: TextTokenizer, path: Path, **changes: object) -> Path:
    """The tokenizer.json with some of its entries changed."""
    path.write_text(json.dumps({**json.loads(tokenizer.serialised), **changes}))
    return path


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@settings(deadline=None)
def test_decoding_gives_the_text_back(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_document_is_id_0_and_never_comes_from_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.eos_id == 0
    text = f"{END_OF_DOCUMENT} a{END_OF_DOCUMENT}b\n{END_OF_DOCUMENT}"
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0]) == END_OF_DOCUMENT


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer: TextTokenizer, texts: list[str]) -> None:
    ids = [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
    assert tokenizer.n_bytes(np.concatenate([np.zeros(0, np.int64), *ids])) == len("".join(texts).encode())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)), st.lists(st.integers(0, 500)))
def test_bytes_are_exact_where_characters_are_cut(tokenizer: TextTokenizer, texts: list[str], cuts: list[int]) -> None:
    ids = np.concatenate([np.zeros(0, np.int64), *(np.append(ids, 0) for ids in tokenizer.encode_batch(texts))])
    parts = np.split(ids, sorted(min(cut, len(ids)) for cut in cuts))
    assert sum(tokenizer.n_bytes(part) for part in parts) == len("".join(texts).encode())


def test_bytes_of_ids_that_are_no_byte_level_pieces(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Padding of the embedding has no text, added tokens have their own, and other decoders are asked."""
    assert tokenizer.n_bytes(np.array([tokenizer.vocab_size, 400, 0])) == 0
    run = {"id": 320, "content": "   ", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    added = [*json.loads(tokenizer.serialised)["added_tokens"], {**run, "special": False}]
    spaces = load_tokenizer(changed(tokenizer, tmp_path / "spaces.json", added_tokens=added))
    ids = spaces.encode("a    ü")
    assert 320 in ids
    assert spaces.n_bytes(ids) == len("a    ü".encode())
    dna = dna_tokenizer()
    assert dna.n_bytes(np.append(dna.encode("ACGT"), 0)) == 4


@pytest.mark.parametrize("seed", ["0", "1"])
def test_training_is_deterministic_across_processes(tokenizer: TextTokenizer, seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": "3"}
    found = subprocess.run([sys.executable, "-c", TRAIN], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == tokenizer.sha256


def test_training_reads_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRAINING_BYTES", 1000)
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    train_tokenizer(texts(), 300)
    assert sum(map(len, read[:-1])) <= 1000 + len(read[-1])
    assert len(read) < len(TEXTS)


def test_sizes(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert train_tokenizer(["a"], 500).vocab_size == 257
    with pytest.raises(ValueError, match=r"data\.vocab_size=256: .* at least 257"):
        train_tokenizer(TEXTS, 256)


def test_a_saved_tokenizer_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.serialised)
    loaded = load_tokenizer(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXTS[3]).tolist() == tokenizer.encode(TEXTS[3]).tolist()
    assert 0 not in loaded.encode(END_OF_DOCUMENT)


def test_truncation_and_padding_of_a_users_tokenizer_are_ignored(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = changed(tokenizer, tmp_path / "tokenizer.json", truncation=truncation)
    assert load_tokenizer(path).encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


def test_long_texts_are_cut_where_it_makes_no_difference(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["".join(TEXTS), "a\n\n\nb \n c\n" * 100, "x" * 500, "", "\n" * 300]
    whole = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    monkeypatch.setattr(module, "MAX_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(module, "MAX_CALL_CHARACTERS", 300)
    assert len(list(module._pieces(texts[0]))) > 20
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole


PIECES = [
    "a",
    "B",
    "7",
    "é",
    "e\u0301",
    " ",
    "  ",
    "\n",
    "\r",
    "\t",
    "\x1c",
    "\u3000",
    "'s",
    "'ll",
    ".",
    "日",
    "🐍",
    END_OF_DOCUMENT,
]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.integers(2, 12))
@settings(deadline=None)
def test_pieces_encode_to_the_same_ids(tokenizer: TextTokenizer, text: str, size: int) -> None:
    whole = tokenizer.encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_PIECE_CHARACTERS", size)
        assert "".join(module._pieces(text)) == text
        assert tokenizer.encode(text).tolist() == whole


@pytest.fixture(scope="module")
def neox() -> TextTokenizer:
    default = Path(__file__).resolve().parents[3] / "shared" / "materials"
    path = Path(os.environ.get("MAMBA_TRAIN_MATERIALS", default)) / "20B_tokenizer.json"
    if not path.is_file():
        pytest.skip("the materials folder is not here (MAMBA_TRAIN_MATERIALS)")
    return load_tokenizer(path)


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.integers(2, 12))
@settings(deadline=None)
def test_pieces_encode_to_the_same_ids_with_runs_of_spaces(neox: TextTokenizer, text: str, size: int) -> None:
    test_pieces_encode_to_the_same_ids.hypothesis.inner_test(neox, text, size)  # type: ignore[attr-defined]


def test_a_tokenizer_whose_added_tokens_reach_over_a_cut_gets_texts_whole(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = json.loads(tokenizer.serialised)["added_tokens"]
    bridge = {**added_token("a\nb", special=False), "id": tokenizer.vocab_size}
    loaded = load_tokenizer(changed(tokenizer, tmp_path / "tokenizer.json", added_tokens=[*added, bridge]))
    text = "xa\nb" * 50
    whole = loaded.encode(text).tolist()
    assert whole.count(tokenizer.vocab_size) == 50
    monkeypatch.setattr(module, "MAX_PIECE_CHARACTERS", 10)
    assert loaded.encode(text).tolist() == whole


def test_single_characters_are_looked_up() -> None:
    tokenizer = dna_tokenizer()
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 17)
    ids = tokenizer.encode("ACGTNU")
    assert ids.tolist() == [1, 2, 3, 4, 5, 16]
    assert tokenizer.decode(ids) == "ACGTNU"
    library = [tokenizer._encode_call([text])[0].tolist() for text in ("ACGTNRYSWKMBDHVU" * 3, "T")]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["ACGTNRYSWKMBDHVU" * 3, "T"])] == library
    for text, character in (("ACX", "X"), ("Aé", "é"), ("<|endoftext|>", "<")):
        with pytest.raises(ValueError, match=f"the character '{character}' is not in the vocabulary"):
            tokenizer.encode(text)


def added_token(content: str, special: bool) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 0, "content": content, "special": special, **flags}


def renamed(tokenizer: TextTokenizer, path: Path, name: str, special: bool = True) -> Path:
    """The tokenizer with another name for id 0."""
    model = json.loads(tokenizer.serialised)["model"]
    model["vocab"] = {name if token == END_OF_DOCUMENT else token: i for token, i in model["vocab"].items()}
    return changed(tokenizer, path, model=model, added_tokens=[added_token(name, special)])


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>"])
def test_other_names_for_the_end_of_a_document(tokenizer: TextTokenizer, tmp_path: Path, name: str) -> None:
    loaded = load_tokenizer(renamed(tokenizer, tmp_path / "tokenizer.json", name))
    assert loaded.eos_id == 0
    assert 0 not in loaded.encode(f"a {name}")


def test_a_tokenizer_that_marks_the_beginning_of_a_text_gets_it_whole(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    loaded = load_tokenizer(changed(tokenizer, tmp_path / "tokenizer.json", pre_tokenizer=pre_tokenizer))
    text = "def\nreturn\n" * 50
    whole = loaded.encode(text).tolist()
    assert whole != tokenizer.encode(text).tolist()
    monkeypatch.setattr(module, "MAX_PIECE_CHARACTERS", 50)
    assert loaded.encode(text).tolist() == whole


def test_unusable_tokenizers_are_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*tokenizer\.json: no such file"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*: cannot be read"):
        load_tokenizer(tmp_path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*: not a tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"no end-of-document token; expected one of <\|endoftext\|>"):
        load_tokenizer(renamed(tokenizer, path, "<end>"))
    with pytest.raises(ValueError, match=r"encodes to the end-of-document id 0; mark"):
        load_tokenizer(renamed(tokenizer, path, END_OF_DOCUMENT, special=False))


def test_the_neox_tokenizer(materials: Path) -> None:
    tokenizer = load_tokenizer(materials / "20B_tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50_277, 0)
    assert tokenizer.encode("Hey how are you doing?").tolist() == [8262, 849, 403, 368, 2509, 32]
    assert 0 not in tokenizer.encode(f"a {END_OF_DOCUMENT}")
