"""From the config to corpora: names, labels, splits, tokenizers."""

from pathlib import Path
from typing import Any

import pytest

from mamba_train.config_data import DataConfig, DataSource, MixtureStage
from mamba_train.data.opening import OpenedData, open_data
from tests.data.folders import numbered, write_folder

CC, WIKI = "Pile-CC", "Wikipedia (en)"


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Two groups of two domains, and a validation split with both."""
    shards = [(CC, numbered(1, 5, 20)), (WIKI, numbered(200, 3, 20)), (CC, numbered(300, 5, 20)), (WIKI, [])]
    held_out = [(CC, numbered(1000, 2, 20)), (WIKI, numbered(1100, 2, 20))]
    return write_folder(tmp_path / "pile", {"train": shards, "validation": held_out})


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """One domain without a label, nothing held out."""
    return write_folder(tmp_path / "books", {"train": [("", numbered(2000, 5, 20))]})


def opened(log: list[str] | None = None, **settings: Any) -> OpenedData:
    if "mixture" in settings:
        settings["mixture"] = [MixtureStage(step, weights) for step, weights in settings["mixture"]]
    if "path" not in settings:
        settings["sources"] = {name: str(path) for name, path in settings["sources"].items()}
    paths = {name: str(path) for name, path in settings.pop("validation_paths", {}).items()}
    config = DataConfig(name="x", source=DataSource.shards, validation_paths=paths, **settings)
    return open_data(config, [].append if log is None else log.append)


def test_one_folder_is_one_corpus(pile: Path) -> None:
    data = opened(path=str(pile))
    assert list(data.corpora) == [""]
    assert data.corpora[""] is data.everything
    assert data.everything.n_tokens == 13 * 21
    assert data.everything.tokens(4).tolist() == [1, 2, 3, 4]
    assert data.stages == [(0, {"": 1.0})]


def test_a_weight_names_a_domain_of_the_one_folder(pile: Path) -> None:
    data = opened(path=str(pile), mixture=[(0, {CC: 1, WIKI: 0}), (5, {WIKI: 1})])
    assert {name: corpus.n_tokens for name, corpus in data.corpora.items()} == {CC: 210, WIKI: 63}
    assert data.corpora[CC].tokens()[105:108].tolist() == [300, 301, 302]


def test_a_weight_names_a_source_or_a_domain_of_it(pile: Path, books: Path) -> None:
    data = opened(sources={"pile": pile, "books": books}, mixture=[(0, {f"pile/{WIKI}": 1, "books": 2})])
    assert {name: corpus.n_tokens for name, corpus in data.corpora.items()} == {f"pile/{WIKI}": 63, "books": 105}
    assert data.everything.n_tokens == 13 * 21 + 105
    assert data.folders == {"pile": pile, "books": books}


def test_several_sources_without_a_mixture_are_read_as_one(pile: Path, books: Path) -> None:
    data = opened(sources={"pile": pile, "books": books})
    assert list(data.corpora) == [""]
    assert data.corpora[""].tokens()[13 * 21 :].tolist()[:2] == [2000, 2001]


def test_domains_that_are_validated_on(pile: Path, books: Path, tmp_path: Path) -> None:
    assert list(opened(path=str(pile)).validation) == [CC, WIKI]
    assert opened(path=str(books)).validation == {}
    both = opened(sources={"pile": pile, "books": books}).validation
    assert {name: corpus.split for name, corpus in both.items()} == dict.fromkeys(
        [f"pile/{CC}", f"pile/{WIKI}"], "validation"
    )
    # A folder of its own for validation: all of it, or the split it has for that.
    judge = write_folder(tmp_path / "judge", {"train": [("", numbered(4000, 5, 20))]})
    alone = opened(path=str(pile), validation_paths={"judge": judge}).validation
    assert {name: (corpus.folder, corpus.split) for name, corpus in alone.items()} == {"": (judge, "train")}
    several = opened(path=str(books), validation_paths={"judge": judge, "pile": pile}).validation
    assert {name: corpus.split for name, corpus in several.items()} == {
        "judge": "train",
        f"pile/{CC}": "validation",
        f"pile/{WIKI}": "validation",
    }


def test_text_that_is_trained_on_does_not_validate(books: Path, pile: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation_paths: a shard of .*books"):
        opened(sources={"pile": pile, "books": books}, validation_paths={"books": books})


def test_a_source_without_a_weight_is_mentioned(pile: Path, books: Path) -> None:
    log: list[str] = []
    opened(log, sources={"pile": pile, "books": books}, mixture=[(0, {f"pile/{WIKI}": 1})])
    assert [line for line in log if "warning" in line] == [
        "data: warning: no stage of data.mixture has a weight for books"
    ]


def test_names_that_are_not_there(pile: Path, books: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.mixture: pile/Wikipedia: .*\(did you mean Wikipedia \(en\)\?\); it has: Pile-CC, Wiki"
    ):
        opened(sources={"pile": pile, "books": books}, mixture=[(0, {"pile/Wikipedia": 1, "books": 1})])
    with pytest.raises(
        ValueError, match=r"data\.mixture: bookz: there is no data\.sources\.bookz \(did you mean books\?\)"
    ):
        opened(sources={"pile": pile, "books": books}, mixture=[(0, {"bookz": 1})])
    with pytest.raises(ValueError, match=r"has no domain 'CC'"):
        opened(path=str(pile), mixture=[(0, {"CC": 1})])


def test_one_tokenizer_for_all(pile: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", {"train": [("", numbered(1, 5, 20))]}, tokenizer=b"{ }")
    for settings in (
        {"sources": {"pile": pile, "other": other}},
        {"path": str(pile), "validation_paths": {"o": other}},
    ):
        with pytest.raises(ValueError, match=r"other was made with another tokenizer than .*pile"):
            opened(**settings)


def test_damage_is_found_before_the_first_step(pile: Path, books: Path) -> None:
    shard = books / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[6] ^= 1
    shard.write_bytes(content)
    sources = {"pile": pile, "books": books}
    opened(sources=sources)  # the size is right
    with pytest.raises(ValueError, match=r"data\.sources\.books=.*train-00000\.bin was changed"):
        opened(sources=sources, check_hashes=True)
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"data\.sources\.books=.*train-00000\.bin has 208 bytes instead of 210"):
        opened(sources=sources)
    with pytest.raises(ValueError, match=r"data\.validation_paths\.b=.*train-00000\.bin has 208 bytes"):
        opened(path=str(pile), validation_paths={"b": books})
    shard.unlink()
    with pytest.raises(ValueError, match=r"data\.sources\.books=.*train-00000\.bin is missing"):
        opened(sources=sources)
