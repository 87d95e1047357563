"""The section `data` of the schema; see `mamba_train.config`."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

LONGEST_ASKED_PAUSE_SECONDS = 600.0  # between two requests, by a server that says when to come back


class DataSource(StrEnum):
    """Where the text comes from."""

    stdlib = "stdlib"  # the Python standard library of this machine
    local = "local"  # a folder (or one file) of .txt, .jsonl, .jsonl.zst, .jsonl.gz, .parquet
    shards = "shards"  # a folder of token shards that data_prep made
    stream = "stream"  # files or a dataset of the hub, tokenised while they are read
    synthetic = "synthetic"  # no text: a task of data.task, made up as it is read


class EncoderKind(StrEnum):
    """Which library turns text into ids, with source=stream."""

    tokenizers = "tokenizers"  # the reference
    fastokens = "fastokens"  # some twenty times as fast; its ids are compared with the reference's now and then


class SyntheticTask(StrEnum):
    """A task of the papers that needs no text; see `mamba_train.data.synthetic`."""

    induction_heads = "induction_heads"
    selective_copying = "selective_copying"
    mqar = "mqar"  # multi-query associative recall


class BadDocuments(StrEnum):
    """What happens to a document that cannot be used: an invalid line, an empty text, bytes that are not UTF-8."""

    error = "error"  # stop, with the file, the line and the reason
    skip = "skip"  # leave it out, count it


@dataclass
class MixtureStage:
    """The weights by which samples are drawn after so many steps; they need not sum to 1."""

    from_step: int = MISSING
    weights: dict[str, float] = MISSING  # of SOURCE or SOURCE/LABEL; of LABEL where the source is data.path


@dataclass
class DataConfig:
    """The text, how it is tokenised, how it is cut into sequences and in which proportions these are mixed."""

    name: str = MISSING
    source: DataSource = MISSING
    path: str | None = None  # for source=local a folder or file, for source=shards a folder
    text_key: str = "text"  # field of a JSON line or column that holds the text
    bad_documents: BadDocuments = BadDocuments.error
    max_bad_share: float = 0.01  # with bad_documents=skip, stop if more than this share is left out
    tokenizer: str | None = None  # a tokenizer.json; null: train one on the training split
    vocab_size: int = 4096  # of the tokenizer that is trained
    validation_fraction: float = 0.05
    sequence_length: int = 256  # tokens the model sees at once
    reset_state_at_documents: bool = True
    cache_dir: str = ".cache/data"
    check_hashes: bool = False  # the first rank reads all shards at the start and compares them with the manifest
    # Several folders in the place of `path`, each by a name, for source=shards
    sources: dict[str, str] = field(default_factory=dict)
    mixture: list[MixtureStage] = field(default_factory=list)  # empty: all windows once, then again in another order
    validation_paths: dict[str, str] = field(default_factory=dict)  # by name; empty: the sources' validation splits
    mask_loss_at_documents: bool = False  # no loss on the first token of a document
    workers: int | None = None  # processes that read ahead; null: 2 on a GPU, none on the CPU
    prefetch_batches: int = 4  # micro-batches that each of them holds ready
    allow_changed: bool = False  # go on from a checkpoint that was trained on other tokens
    # source=stream
    lanes: int | None = None  # virtual streams, a multiple of the global batch; null: training.global_batch_size
    repeat: bool = True  # false: each document once, and the run ends when all are read
    shuffle_files: bool = False  # another order of the files in each epoch
    shuffle_documents: int = 0  # documents are permuted in blocks of so many; 0: the order of the files
    continue_lanes: bool = False  # row j of a step goes on with the text of row j of the step before; checked
    cache_shards: bool = False  # write shards into cache_dir meanwhile, and train on those that are finished
    cache_group_mib: int = 64  # stored MiB of input files that become shards at once
    cache_workers: int = 2  # processes that make them, of each source, beside rank 0
    encoder: EncoderKind = EncoderKind.tokenizers
    network_retries: int = 8  # of a request in a row, with longer and longer pauses, before the run ends
    network_timeout_seconds: float = 60.0  # without a single byte
    hub_config: str | None = None  # of a dataset named hf:NAME
    hub_revision: str | None = None
    hub_split: str | None = None  # null: train
    # for source=synthetic; vocab_size and sequence_length are the task's
    task: SyntheticTask | None = None
    task_items: int = 16  # tokens to copy, or pairs of key and value
    test_lengths: list[int] = field(default_factory=list)  # at which a trained model is tested at the end
    test_samples: int = 256  # at each length


def patience_seconds(data: DataConfig) -> float:
    """How long a stream may wait for a server that brings nothing before it ends the run."""
    retries = data.network_retries
    return retries * LONGEST_ASKED_PAUSE_SECONDS + (retries + 1) * data.network_timeout_seconds
