"""Fast encoders are checked against the reference, and what they lose or make up is noticed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from mamba_train.data.encoders import CHECKED_FIRST, CheckedEncoder, ReferenceEncoder, fastokens_call
from mamba_train.data.manifest import find_problem
from mamba_train.data.text_files import TextRecord
from mamba_train.data.tokenizer import load_tokenizer
from tests.data_prep.conftest import write_rows
from tests.data_prep.helpers import Row, contents, make_shards, pile_inputs

MakePile = Callable[..., dict[str, list[Row]]]


def test_a_wrong_encoder_is_found_and_replaced(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    """The fault that a published fast encoder has: "\\t's" is cut elsewhere, which few documents show."""
    pile()
    write_rows(tmp_path / "raw" / "train" / "02.jsonl.zst", [(f"text {i}", "A") for i in range(9)] + [("\t's", "A")])
    tokenizer = load_tokenizer(tokenizer_file)

    def wrong(texts: Sequence[str]) -> list[np.ndarray]:
        pairs = zip(texts, tokenizer.encode_batch(texts), strict=True)
        return [ids[::-1] if "\t's" in text else ids for text, ids in pairs]

    log: list[str] = []
    make_shards(pile_inputs(tmp_path), tmp_path / "good", tokenizer_file)
    make_shards(
        pile_inputs(tmp_path), tmp_path / "out", tokenizer_file, log,
        make_encoder=lambda tokenizer: CheckedEncoder(tokenizer, "wrong 1.0", wrong),
    )  # fmt: skip
    good, found = contents(tmp_path / "good"), contents(tmp_path / "out")
    groups = {name for name in good if name.startswith("groups")}
    assert {name: data for name, data in found.items() if name not in groups} == {
        name: data for name, data in good.items() if name not in groups
    }
    assert [json.loads(found[name])["encoder"].split()[0] for name in sorted(groups)] == [
        "wrong", "wrong", "tokenizers", "wrong", "wrong", "wrong",
    ]  # fmt: skip
    warnings = [line for line in log if "WARNING: train-00002" in line]
    assert len(warnings) == 1
    assert "wrong 1.0 gives" in warnings[0]


def test_the_check_looks_at_each_domain_and_far_into_the_group(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    seen: list[str] = []

    class Noting(CheckedEncoder):
        def _check(self, text: str, ids: np.ndarray) -> None:
            seen.append(text)
            super()._check(text, ids)

    encoder = Noting(tokenizer, "fast", tokenizer.encode_batch)
    records = [TextRecord(n, f"text {n}", 1, "A" if n < 900 else "B") for n in range(1100)]
    for first in range(0, 1100, 100):
        encoder.encode(records[first : first + 100])
    checked = [*range(CHECKED_FIRST), 512, *range(900, 900 + CHECKED_FIRST), 1024]
    assert seen == [f"text {n}" for n in checked]


def test_an_encoder_that_fails_is_replaced(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    pile(1)

    def failing(texts: Sequence[str]) -> list[np.ndarray]:
        raise RuntimeError("no such thing")

    log: list[str] = []
    make_shards(
        pile_inputs(tmp_path), tmp_path / "out", tokenizer_file, log,
        make_encoder=lambda tokenizer: CheckedEncoder(tokenizer, "failing 1.0", failing),
    )  # fmt: skip
    assert find_problem(tmp_path / "out", with_hashes=True) is None
    assert sum("failing 1.0 fails (no such thing)" in line for line in log) == 2


def test_a_text_without_tokens_is_a_bad_document(tmp_path: Path, pile: MakePile, tokenizer_file: Path) -> None:
    rows = pile()

    class Dropping(ReferenceEncoder):
        def encode(self, records: Sequence[TextRecord]) -> list[np.ndarray]:
            pairs = zip(records, super().encode(records), strict=True)
            return [ids[:0] if record.text == "x" else ids for record, ids in pairs]

    inputs, folder = pile_inputs(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"00\.jsonl\.zst:1: the tokenizer drops it all; --bad-documents=skip"):
        make_shards(inputs, tmp_path / "no", tokenizer_file, make_encoder=Dropping)
    manifest = make_shards(
        inputs, folder, tokenizer_file, make_encoder=Dropping, bad_documents="skip", max_bad_share=0.2
    )
    assert manifest is not None
    n_dropped = sum(text == "x" for listed in rows.values() for text, _ in listed)
    assert manifest.dropped == {"no tokens": n_dropped}
    n_all = sum(map(len, rows.values()))
    assert manifest.total("train", "n_documents") + manifest.total("validation", "n_documents") == n_all - n_dropped
    assert sum(read["n_documents"] for read in manifest.source["inputs"]) == n_all - n_dropped
    write_rows(tmp_path / "raw" / "few.jsonl", [("x", "A"), ("y", "A")])
    options: dict[str, Any] = {"make_encoder": Dropping, "bad_documents": "skip"}
    with pytest.raises(ValueError, match=r"1 of 2 documents cannot be used"):  # none is counted on both sides
        make_shards([f"{tmp_path}/raw/few.jsonl"], tmp_path / "half", tokenizer_file, max_bad_share=0.4, **options)


def test_an_end_of_document_id_that_an_encoder_makes_of_text_is_refused(
    tmp_path: Path, pile: MakePile, tokenizer_file: Path
) -> None:
    pile()

    class Careless(ReferenceEncoder):
        def encode(self, records: Sequence[TextRecord]) -> list[np.ndarray]:
            return [np.append(ids, 0) for ids in super().encode(records)]

    with pytest.raises(ValueError, match=r"00\.jsonl\.zst:1: the encoder made an end-of-document id"):
        make_shards(pile_inputs(tmp_path), tmp_path / "out", tokenizer_file, make_encoder=Careless)


EDGES = [
    "\t's it's\t'll", "e\u0301 \u1e9b\u0323 \ufb01 \u212b", "a\r\nb\r\n\r\nc", "<|endoftext|>",
    "<|padding|> x<|endoftext|>y", *(f"a{' ' * n}b{' ' * n}" for n in range(1, 50)), "\x00\x1c\x85\u2028\u3000",
    "🐍🇩🇪", "1234567 12 a1b2", "\n" * 30 + "x", "don't DON'T 'S", "=" * 1000, "ab" * 5000,
]  # fmt: skip


def test_the_neox_tokenizer_by_both_encoders(materials: Path) -> None:
    tokenizer = load_tokenizer(materials / "20B_tokenizer.json")
    with zstandard.open(materials / "minipile.jsonl.zst", "rt", encoding="utf-8") as stream:
        texts = [json.loads(next(stream))["text"] for _ in range(30)] + EDGES
    expected = tokenizer.encode_batch(texts)
    assert all(tokenizer.eos_id not in ids for ids in expected)
    found = tokenizer.encode_batch(texts, fastokens_call(tokenizer))
    for text, a, b in zip(texts, found, expected, strict=True):
        assert np.array_equal(a, b), text[:50]
    records = [TextRecord(number, text, 0) for number, text in enumerate(texts)]
    checked = CheckedEncoder(tokenizer, "fastokens", fastokens_call(tokenizer)).encode(records)
    assert all(np.array_equal(a, b) for a, b in zip(checked, expected, strict=True))
