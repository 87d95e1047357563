"""What a data config names, opened and checked: the tokens to train on, by source, and the text to validate on."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data.corpus import Corpus
from mamba_train.data.documents import Log, Split
from mamba_train.data.manifest import Manifest, read_manifest
from mamba_train.data.prepare import check_prepared, prepare
from mamba_train.data.synthetic import SyntheticCorpus, prepare_task, task_corpus

Folder = tuple[Path, Manifest]


@dataclass(frozen=True)
class OpenedData:
    """Tokens that are there and fit together.

    folders: the sources by name ("" for the only one); held_out: folders that are only validated on. everything: all
    training tokens. corpora and stages: what `BatchSource` takes; without a mixture the one source is everything,
    named "". validation: the held-out text by domain, "" where there is one domain only, empty where there is none.
    """

    folders: dict[str, Path]
    held_out: dict[str, Path]
    everything: Corpus | SyntheticCorpus
    corpora: Mapping[str, Corpus | SyntheticCorpus]
    stages: list[tuple[int, dict[str, float]]]
    validation: Mapping[str, Corpus | SyntheticCorpus]

    @property
    def folder(self) -> Path:
        """A folder with the tokenizer of all."""
        return self.everything.folder

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.everything.vocab_size

    @property
    def size(self) -> str:
        """How much there is, in words."""
        return f"{self.everything.n_tokens:,} training tokens"


def open_data(data: DataConfig, log: Log) -> OpenedData:
    """Prepare or check the folders that a config names, and open them.

    Raises ValueError, one line that begins with the key or names the file, for whatever is not as it should be.
    """
    if data.source is DataSource.synthetic:
        return _open_task(data)
    folders, held_out = {}, {}
    for name, path in data.sources.items():
        folders[name] = check_prepared(Path(path).expanduser(), f"data.sources.{name}={path}", data.check_hashes)
        log(f"data: {name}: using {folders[name]}")
    if not data.sources:
        folders[""] = prepare(data, log)
    for name, path in data.validation_paths.items():
        key = f"data.validation_paths.{name}={path}"
        held_out[name] = check_prepared(Path(path).expanduser(), key, data.check_hashes)
    opened = open_folders(folders, held_out, [(stage.from_step, dict(stage.weights)) for stage in data.mixture])
    unused = [name for name in folders if name and not any(_is_of(corpus, name) for corpus in opened.corpora)]
    if unused:
        log(f"data: warning: no stage of data.mixture has a weight for {', '.join(unused)}")
    return opened


def _open_task(data: DataConfig) -> OpenedData:
    folder = prepare_task(data)
    everything = task_corpus(data, "train", folder)
    stages = [(0, {"": 1.0})]
    return OpenedData(
        {"": folder}, {}, everything, {"": everything}, stages, {"": task_corpus(data, "validation", folder)}
    )


def open_folders(
    folders: Mapping[str, Path], held_out: Mapping[str, Path], stages: Sequence[tuple[int, dict[str, float]]] = ()
) -> OpenedData:
    """Open prepared folders that have been checked; see `OpenedData`. Raises ValueError as `open_data` does."""
    sources = {name: (folder, read_manifest(folder)) for name, folder in folders.items()}
    judges = {name: (folder, read_manifest(folder)) for name, folder in held_out.items()}
    _check_one_tokenizer([*sources.values(), *judges.values()])
    everything = Corpus(list(sources.values()), "train")
    if stages:
        names = sorted({name for _, weights in stages for name, weight in weights.items() if weight})
        corpora = {name: _component(name, sources) for name in names}
    else:
        stages, corpora = [(0, {"": 1.0})], {"": everything}
    validation = held_out_domains(sources, judges)
    _check_held_out(everything, validation)
    return OpenedData(dict(folders), dict(held_out), everything, corpora, list(stages), validation)


def _check_one_tokenizer(folders: Sequence[Folder]) -> None:
    (first, manifest), *others = folders
    for folder, other in others:
        if other.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise ValueError(
                f"data.sources: {folder} was made with another tokenizer than {first} (SHA-256 "
                f"{other.tokenizer_sha256:.12} and {manifest.tokenizer_sha256:.12}); they need the same one"
            )


def check_held_out_tokenizer(folders: Mapping[str, Folder], sha256: str) -> None:
    """Raise ValueError (`data.validation_paths`) for shards that were not made with this tokenizer."""
    for name, (folder, manifest) in folders.items():
        if manifest.tokenizer_sha256 != sha256:
            raise ValueError(
                f"data.validation_paths.{name}: {folder} was made with another tokenizer than data.tokenizer (SHA-256 "
                f"{manifest.tokenizer_sha256:.12} and {sha256:.12}); they need the same one"
            )


def _is_of(name: str, source: str) -> bool:
    return name in ("", source) or name.startswith(f"{source}/")


def _component(name: str, folders: Mapping[str, Folder]) -> Corpus:
    """The tokens that a weight is for: those of a source, or of one label in it."""
    source, _, label = ("", "", name) if "" in folders else name.partition("/")
    if source not in folders:
        raise ValueError(f"data.mixture: {name}: there is no data.sources.{source}{_near(source, list(folders))}")
    folder, manifest = folders[source]
    labels = list(dict.fromkeys(entry.label for entry in manifest.shards["train"]))
    if label and label not in labels:
        known = ", ".join(label for label in labels if label) or "none"
        raise ValueError(
            f"data.mixture: {name}: {folder} has no domain {label!r}{_near(label, labels)}; it has: {known}"
        )
    return Corpus([(folder, manifest)], "train", [label] if label else None)


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def held_out_domains(folders: Mapping[str, Folder], held_out: Mapping[str, Folder]) -> dict[str, Corpus]:
    """The text to validate on by domain: of the folders that are held out, else the validation splits of the others."""
    found: dict[str, Corpus] = {}
    for name, (folder, manifest) in (held_out or folders).items():
        split: Split = "validation"
        if held_out and not manifest.total(split, "n_tokens"):
            split = "train"  # the whole folder is there to be validated on
        labels = dict.fromkeys(entry.label for entry in manifest.shards[split] if entry.n_tokens)
        for label in labels:
            corpus = Corpus([(folder, manifest)], split, [label])
            found["/".join(part for part in (name, label) if part)] = corpus
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _check_held_out(training: Corpus, validation: Mapping[str, Corpus]) -> None:
    for name, corpus in validation.items():
        if corpus.shard_hashes & training.shard_hashes:
            raise ValueError(
                f"data.validation_paths: a shard of {corpus.folder} ({name or 'validation'}) is among the shards to "
                "train on; validation text must not be trained on"
            )
