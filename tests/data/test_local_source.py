import json
import os
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.config_data import BadDocuments
from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.documents import Document, cut_tail
from mamba_train.data.local_source import LocalSource


def read(path: Path, fraction: float = 0.1, text_key: str = "text") -> tuple[list[Document], Counter[str]]:
    source = LocalSource(str(path), text_key)
    log: list[str] = []
    rule = source.choose_split(fraction, log.append)
    assert any(rule in line for line in log)
    dropped: Counter[str] = Counter()
    documents = list(source.documents(dropped))
    assert list(source.documents(Counter())) == documents
    return documents, dropped


def texts_of(path: Path | None, text_key: str = "text") -> list[str]:
    bad = BadDocumentFilter(BadDocuments.error, 0.0, print)
    return [text for _, _, text in LocalSource(None if path is None else str(path), text_key)._texts(bad)]


def whole_texts(path: Path, text_key: str = "text") -> list[str]:
    return texts_of(path, text_key)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def failure(path: Path | None, text_key: str = "text") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        texts_of(path, text_key)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_kinds_recursively_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["three", "naïve 🐍"]) + b"\n  \n" + jsonl(["last"]).rstrip())
    (tmp_path / "sub" / "c.JSONL.ZST").write_bytes(zstandard.compress(jsonl(["five", "six"])))
    (tmp_path / "sub" / "deep" / "z.txt").write_text("seven")
    (tmp_path / "sub" / "picture.png").write_bytes(b"\x89")
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / ".x.txt").write_text("hidden")
    found = whole_texts(tmp_path)
    assert found == ["three", "naïve 🐍", "last", "one\r\ntwo\n", "five", "six", "seven"]
    log: list[str] = []
    LocalSource(str(tmp_path), "text").choose_split(0.1, log.append)
    assert any("1 files" in line and "ignored" in line for line in log)


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", "y"], "content"))
    assert whole_texts(tmp_path / "a.jsonl", "content") == ["x", "y"]


@given(st.integers(1, 7), st.lists(st.text(st.characters(exclude_categories=["Cs"])).map("x".__add__), max_size=6))
def test_chunks_do_not_matter(tmp_path_factory: pytest.TempPathFactory, chunk: int, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_bytes(jsonl(texts))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba_train.data.stored_files.CHUNK_BYTES", chunk)
        assert whole_texts(folder) == texts + texts


def test_several_zstd_frames(tmp_path: Path) -> None:
    data = jsonl([f"text {i}" for i in range(100)])
    frames = zstandard.compress(data[:700]) + zstandard.compress(b"") + zstandard.compress(data[700:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert whole_texts(tmp_path) == [f"text {i}" for i in range(100)]


def test_paths_that_give_nothing(tmp_path: Path) -> None:
    assert "data.path is not set" in failure(None)
    assert f"data.path={tmp_path / 'no'}: no such file or folder" in failure(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "no file of a supported kind (.txt, .jsonl, .jsonl.zst, .jsonl.gz, .parquet)" in failure(tmp_path / "empty")
    assert "it is empty" in failure(tmp_path / "empty")
    (tmp_path / "data.csv").write_text("a,b")
    assert "only 1 others" in failure(tmp_path)
    assert "not a file of a supported kind" in failure(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', ":7: invalid JSON (Expecting ',' delimiter at column 13)"),
        (b"not json", ":7: invalid JSON (Expecting value at column 1)"),
        (b'["x"]', ":7: expected a JSON object, got list"),
        (b'{"txt": "x"}', ":7: no field 'text' (data.text_key), only 'txt'"),
        (b'{"text": 7}', ":7: field 'text' (data.text_key) must be a string, got a number"),
        (b'{"text": null}', ":7: field 'text' (data.text_key) must be a string, got NoneType"),
        (b'{"text": "\xff"}', ":7: not valid UTF-8 (byte 0xff)"),
        (b'{"text": "\\ud800"}', ":7: the text has an unpaired surrogate"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", ":7: unusable JSON (Exceeds the limit"),
        (b"[" * 100_000, ":7: unusable JSON ("),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str, suffix: str) -> None:
    data = jsonl([f"text {i}" for i in range(6)]) + line + b"\n" + jsonl(["after"])
    path = tmp_path / f"file{suffix}"
    path.write_bytes(zstandard.compress(data) if suffix.endswith("zst") else data)
    assert f"data.path: {path}{message}" in failure(tmp_path)


def test_bad_bytes_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert "a.txt:1: not valid UTF-8 (byte 0xe9 in line 3)" in failure(tmp_path)


@pytest.mark.parametrize("keep", [1, 5, 100, -1])
def test_truncated_zstd_is_not_taken_for_the_end(tmp_path: Path, keep: int) -> None:
    # Flushed often, so that much text comes out before the missing part.
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(jsonl([f"text {i}"])) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
             for i in range(50)]  # fmt: skip
    data = b"".join(parts) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert len(whole_texts(tmp_path)) == 50
    (tmp_path / "a.jsonl.zst").write_bytes(data[:keep])
    assert "a.jsonl.zst: the zstd data is truncated" in failure(tmp_path)


def test_something_else_named_zst(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x1f\x8b\x08" * 10)
    assert "a.jsonl.zst: damaged zstd data" in failure(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert "a.txt: cannot be read (Permission denied)" in failure(tmp_path)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    assert "a.txt: cannot be read (No such file" in failure(tmp_path)


def test_documents_are_held_out_by_a_stable_hash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"text {i}" for i in range(1000)]))
    documents, _ = read(tmp_path, 0.1)
    held_out = {document.origin for document in documents if document.split == "validation"}
    assert 60 < len(held_out) < 140
    assert sorted(document.text for document in documents) == sorted(f"text {i}" for i in range(1000))
    # Other texts, more documents behind and more files beside change nothing for those that were there.
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"other text {i}" for i in range(1500)]))
    (tmp_path / "0.txt").write_text("before")
    more, _ = read(tmp_path, 0.1)
    early = {document.origin for document in documents}
    assert {d.origin for d in more if d.split == "validation" and d.origin in early} == held_out


def test_few_documents_are_cut_at_a_line_break(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    documents, _ = read(tmp_path, 0.1)
    assert [document.split for document in documents] == ["train", "validation"]
    head, tail = (document.text for document in documents)
    assert head + tail == text
    assert head.endswith("\n")
    assert abs(len(tail) / len(text) - 0.1) < 0.01


def test_the_rule_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"text {i}" for i in range(10)]))
    rule = LocalSource(str(tmp_path), "text").choose_split(0.1, lambda line: None)
    assert "the last 10.0% of each document" in rule
    assert "only 10 documents" in rule


@given(st.text("ab \n", min_size=0, max_size=60), st.floats(0.01, 0.99))
def test_cutting_loses_nothing(text: str, fraction: float) -> None:
    head, tail = cut_tail(text, fraction)
    assert head + tail == text
    assert head or not text
    assert len(tail) <= max(2 * fraction * len(text), 1)


def test_cutting_prefers_a_near_line_break() -> None:
    assert cut_tail("aaaa\nbbbb\ncccc\n", 1 / 3) == ("aaaa\nbbbb\n", "cccc\n")
    assert cut_tail("aaaa bbbb cccc", 1 / 3) == ("aaaa bbbb ", "cccc")
    assert cut_tail("a" * 90, 1 / 3) == ("a" * 60, "a" * 30)
    assert cut_tail("a", 0.5) == ("a", "")


def test_repeated_texts_are_left_out(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(jsonl([*texts, "text 5", *texts[:3]]))
    documents, dropped = read(tmp_path)
    assert [document.text for document in documents] == texts
    assert dropped == {"duplicate": 4}


def test_bad_documents_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", *texts, " \n"]) + b"not json\n")
    assert "a.jsonl:1: the text is empty; data.bad_documents=skip leaves" in failure(tmp_path)
    log: list[str] = []
    source = LocalSource(str(tmp_path), "text", BadDocuments.skip, 0.01, log.append)
    source.choose_split(0.1, log.append)
    dropped: Counter[str] = Counter()
    assert [document.text for document in source.documents(dropped)] == texts
    assert dropped == {"empty": 2, "invalid JSON": 1}
    assert source.record()["skipped"] == {"a.jsonl": {"empty": 2, "invalid JSON": 1}}
    assert len(list(source.documents(Counter()))) == len(texts)
    assert sum("left out" in line and "a.jsonl:303: invalid JSON" in line for line in log) == 1
    source = LocalSource(str(tmp_path), "text", BadDocuments.skip, 0.009, log.append)
    with pytest.raises(ValueError, match=r"3 of 303 documents cannot be used .* data\.max_bad_share=0\.009"):
        list(source.documents(Counter()))


def test_the_identity_follows_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    os.utime(path, ns=(1, 1))
    first = LocalSource(str(tmp_path), "text").identity()
    assert LocalSource(str(tmp_path), "text").identity() == first
    os.utime(path, ns=(1, 2))
    assert LocalSource(str(tmp_path), "text").identity() != first
    (tmp_path / "b.txt").write_text("y")
    assert len(LocalSource(str(tmp_path), "text").identity()["files"]) == 2
