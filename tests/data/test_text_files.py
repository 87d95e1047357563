import gzip
import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from mamba_train.data import stored_files as module
from mamba_train.data import text_files
from mamba_train.data.text_files import BadDocument, Fields, TextRecord, read_texts

PILE = Fields("text", "meta.pile_set_name", "--text-key", "--label-key")
ROWS: list[dict[str, Any]] = [
    {"text": "naïve 🐍", "meta": {"pile_set_name": "Pile-CC"}},
    {"text": "two", "meta": {"pile_set_name": "ArXiv"}},
]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(file: Path, fields: Fields = PILE) -> list[tuple[int, str, int, str]]:
    found = []
    for record in read_texts(file, fields):
        assert isinstance(record, TextRecord), record
        found.append((record.number, record.text, record.n_bytes, record.label))
    return found


EXPECTED = [(1, "naïve 🐍", 11, "Pile-CC"), (2, "two", 3, "ArXiv")]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("as_string", [False, True], ids=["meta-object", "meta-string"])
def test_every_kind_gives_text_and_label(tmp_path: Path, suffix: str, as_string: bool) -> None:
    rows = [{**row, "meta": json.dumps(row["meta"])} if as_string else row for row in ROWS]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
        file.write_bytes(pack(jsonl(rows)))
    assert read(file) == EXPECTED
    stored: list[bytes] = []
    list(read_texts(file, PILE, stored.append))
    assert b"".join(stored) == file.read_bytes()


def test_parquet_of_several_row_groups(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}"} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=77)
    assert read(tmp_path / "a.parquet", Fields("text")) == [
        (i + 1, f"text {i}", len(f"text {i}"), "") for i in range(1000)
    ]


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"content": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' \(data\.text_key\), only content"):
        read(tmp_path / "a.parquet", Fields("text"))


def test_damaged_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged parquet data"):
        read(tmp_path / "a.parquet", Fields("text"))


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"caf\xe9", None, b" "], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = list(read_texts(tmp_path / "a.parquet", Fields("text")))
    assert found[0] == TextRecord(1, "fine", 4)
    assert [(bad.number, bad.kind) for bad in found[1:] if isinstance(bad, BadDocument)] == [
        (2, "not UTF-8"), (3, "wrong type"), (4, "empty"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "kind", "problem"),
    [
        ({"text": "x", "meta": {}}, "no field", "no field 'meta.pile_set_name' (--label-key), only an empty object"),
        ({"text": "x"}, "no field", "only 'text'"),
        ({"text": "x", "meta": None}, "no field", "only NoneType"),
        ({"text": "x", "meta": "not json"}, "no field", "only NoneType"),
        ({"text": "x", "meta": {"pile_set_name": 7}}, "wrong type", "must be a string, got a number"),
        ({"text": ["x"], "meta": {"pile_set_name": "A"}}, "wrong type", "(--text-key) must be a string, got list"),
        ({"text": " \u3000\n", "meta": {"pile_set_name": "A"}}, "empty", "the text is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], kind: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([ROWS[0], row, ROWS[1]]))
    good, bad, after = read_texts(tmp_path / "a.jsonl", PILE)
    assert isinstance(bad, BadDocument)
    assert (bad.number, bad.kind) == (2, kind)
    assert problem in bad.problem
    assert [good, after] == [TextRecord(1, *EXPECTED[0][1:]), TextRecord(3, *EXPECTED[1][1:])]


@pytest.mark.parametrize("keep", [1, 30, -1])
def test_truncated_gzip_is_not_taken_for_the_end(tmp_path: Path, keep: int) -> None:
    data = gzip.compress(jsonl(ROWS * 50)) + gzip.compress(jsonl(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert len(read(tmp_path / "a.jsonl.gz")) == 102
    (tmp_path / "a.jsonl.gz").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: the gzip data is truncated"):
        read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_of_no_bytes_was_not_copied_to_its_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.jsonl\..*: the (gzip|zstd) data is truncated"):
        list(read_texts(path, Fields("text")))
    path.write_bytes(gzip.compress(b"") if suffix == "gz" else zstandard.compress(b""))
    assert list(read_texts(path, Fields("text"))) == []


def test_a_flipped_byte_in_gzip(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(jsonl(ROWS * 50)))
    data[-6] ^= 1  # in the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged gzip data"):
        read(tmp_path / "a.jsonl.gz")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1 << 20)
    for name in ("a.jsonl", "a.txt", "a.fa"):
        (tmp_path / name).write_bytes(b"A" * (1 << 21))
        with pytest.raises(ValueError, match=rf"{name}.*more than 1,048,576 bytes"):
            list(read_texts(tmp_path / name, PILE))


def test_fasta(tmp_path: Path) -> None:
    (tmp_path / "a.fa.gz").write_bytes(
        gzip.compress(b">one some words\nACGT\nacgtN\n\n>two\r\nGG\r\nRY\r\n>empty\n>bad\nACX\n")
    )
    assert list(read_texts(tmp_path / "a.fa.gz", PILE)) == [
        TextRecord(1, "ACGTACGTN", 9),
        TextRecord(5, "GGRY", 4),
        BadDocument(8, "empty", "the sequence is empty"),
        BadDocument(9, "unknown base", "position 3 of the sequence is 'X', which is none of ACGTNRYSWKMBDHVU"),
    ]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
ROW = st.fixed_dictionaries({"text": st.one_of(st.text(), VALUES), "other": VALUES})
LINES = st.one_of(
    st.builds(lambda row, ascii: json.dumps(row, ensure_ascii=ascii).encode("utf-8"), ROW, st.booleans()),
    st.builds(lambda row: json.dumps(row).encode("utf-8-sig"), ROW),
    st.builds(
        lambda escape: b'{"text": "a' + escape + b'"}', st.from_regex(rb"(\\u[dD][89a-fA-F]..){1,2}", fullmatch=True)
    ),
    st.builds(lambda row, place: json.dumps(row).encode("utf-8")[:place], ROW, st.integers(0, 60)),
    st.binary(max_size=30),
)


@given(LINES)
@example(b'{"text": "a", "text": "b"}')
@example(b'{"text": "a", "n": NaN}')
@example(b'{"text": "a\tb"}')
@example(b'{"text": "a", "n": 123456789012345678901234567890}')
@example(b'{"text": -9223372036854775809}')
@example(b"123456789012345678901234567890")
@example(b'{"text": "a", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}")
def test_the_fast_parser_has_the_results_of_python(line: bytes) -> None:
    def refuse(line: bytes) -> None:
        raise orjson.JSONDecodeError("refused", "", 0)

    def record() -> Any:
        return list(text_files._convert([(1, line)], lambda line: text_files._json_record(line, Fields("text"))))

    found = record()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files.orjson, "loads", refuse)
        assert found == record()
