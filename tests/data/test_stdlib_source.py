from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data import stdlib_source
from mamba_train.data.documents import Document
from mamba_train.data.stdlib_source import NEVER_HELD_OUT, StdlibSource, choose_validation_folders


def read(root: Path | None, fraction: float = 0.05) -> tuple[list[Document], Counter[str]]:
    source = StdlibSource(root)
    source.choose_split(fraction, lambda line: None)
    dropped: Counter[str] = Counter()
    documents = list(source.documents(dropped))
    assert list(source.documents(Counter())) == documents
    return documents, dropped


@pytest.fixture
def fake_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(StdlibSource, "_read_docstrings", lambda self, log: {"_json": "json docs\n", "sys": "s\n"})
    files = {
        "abc.py": b"top = 1\n" * 20,
        "json/__init__.py": b"decode = 1\r\n" * 9,
        "json/tool.py": "# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n".encode("latin-1"),
        "json/copy.py": b"top = 1\n" * 20,
        "json/empty.py": b"\n",
        "json/bad.py": b"x = '\xff\xfe'\n",
        "json/note.txt": b"not a source",
        "email/parser.py": b"parse = 1\n" * 30,
        "encodings/cp1.py": b"table = 1\n" * 5,
        "test/test_x.py": b"a test\n",
        "lib2to3/tests/data/x.py": b"a test\n",
        "idlelib/idle_test/x.py": b"a test\n",
        "site-packages/pip/x.py": b"not ours\n",
        "config-3.11-x86/python-config.py": b"built = 1\n",
        "_sysconfigdata_linux.py": b"built = 1\n",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_sources_without_tests_builds_and_packages(fake_root: Path) -> None:
    documents, dropped = read(fake_root)
    assert [document.origin for document in documents] == [
        "abc.py",
        "email/parser.py",
        "encodings/cp1.py",
        "json/__init__.py",
        "json/tool.py",
        "docstrings of _json",
        "docstrings of sys",
    ]
    assert dropped == {"duplicate": 1, "empty": 1, "undecodable": 1}
    texts = {document.origin: document.text for document in documents}
    assert "café" in texts["json/tool.py"]
    assert "\r" not in texts["json/__init__.py"]


@pytest.mark.parametrize("folder", ["json", "email"])
def test_whole_folders_are_held_out_with_the_docstrings_that_belong_to_them(
    fake_root: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr(stdlib_source, "choose_validation_folders", lambda sizes, fraction: frozenset({folder}))
    documents, _ = read(fake_root)
    held_out = {document.origin for document in documents if document.split == "validation"}
    expected = {"json": {"json/__init__.py", "json/tool.py", "docstrings of _json"}, "email": {"email/parser.py"}}
    assert held_out == expected[folder]


def test_small_tables_are_not_held_out(fake_root: Path) -> None:
    for fraction in (0.01, 0.1, 0.35, 0.9):
        documents, _ = read(fake_root, fraction)
        held_out = {document.origin for document in documents if document.split == "validation"}
        assert held_out
        assert not held_out & {"abc.py", "encodings/cp1.py", "docstrings of sys"}


def test_a_machine_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source=stdlib: .* use data=local data\.path=FOLDER"):
        StdlibSource(tmp_path / "no")
    (tmp_path / "abc.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"no folder of .* can be held out"):
        StdlibSource(tmp_path).choose_split(0.05, lambda line: None)


folder_names = st.text("abcdefgh_", min_size=1, max_size=6)


@given(
    st.dictionaries(folder_names, st.integers(1, 10**6), min_size=1, max_size=40),
    st.integers(0, 10**7),
    st.floats(0.001, 0.5),
)
def test_validation_is_never_empty(sizes: dict[str, int], top_level: int, fraction: float) -> None:
    everything = {**sizes, "": top_level, "encodings": 10**6, "pydoc_data": 10**6}
    chosen = choose_validation_folders(everything, fraction)
    assert chosen
    assert "" not in chosen
    assert not chosen & NEVER_HELD_OUT
    assert chosen <= set(sizes)


def test_many_folders_give_about_the_fraction_from_several() -> None:
    sizes = {f"folder{i}": 1000 + 377 * (i % 13) for i in range(60)}
    for fraction in (0.05, 0.1, 0.3):
        chosen = choose_validation_folders(sizes, fraction)
        share = sum(sizes[name] for name in chosen) / sum(sizes.values())
        assert abs(share / fraction - 1) < 0.15
        assert len(chosen) >= 2
    # A stable hash, not the order of the dictionary.
    assert choose_validation_folders(dict(reversed(sizes.items())), 0.1) == choose_validation_folders(sizes, 0.1)


def test_the_real_library() -> None:
    documents, _ = read(None)
    n_bytes = Counter[str]()
    for document in documents:
        n_bytes[document.split] += len(document.text.encode())
    assert n_bytes["train"] > 3_000_000
    assert 0.02 < n_bytes["validation"] / sum(n_bytes.values()) < 0.1
    origins = {document.origin: document for document in documents}
    assert not any("/test/" in origin or "/tests/" in origin for origin in origins)
    assert "Return the arc cosine" in origins["docstrings of math"].text
    assert "docstrings of _testcapi" not in origins
    assert len({document.text for document in documents}) == len(documents)


def test_docstrings_that_cannot_be_read_are_said(fake_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(stdlib_source.sys, "executable", "/no/such/python")
    log: list[str] = []
    StdlibSource(fake_root).choose_split(0.35, log.append)
    assert any("WARNING: no docstrings of built-in modules" in line for line in log)
