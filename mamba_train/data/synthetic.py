"""The papers' synthetic tasks, made up as they are read: a sample is a pure function of the task and its number.

So the order of the data (contract C3), workers, resuming and validation are those of any other corpus; a sample of
`length` tokens takes the place of a window. Where the model has to answer, a label says what; elsewhere there is none.

induction_heads    (arXiv 2312.00752, section 4.1.2) random tokens; somewhere token 0, which comes again at the end,
                   where the token that followed it the first time is asked for.
selective_copying  (arXiv 2312.00752, section 4.1.1) `items` tokens among noise (token 0) at random places, and at the
                   end as many markers (token 1), where they are asked for in their order.
mqar               (arXiv 2312.04927, section 3; arXiv 2405.21060, section 9.1) `items` pairs of a key and a value, then
                   each key once more at a random place among noise (token 0), where its value is asked for. The
                   second paper has random tokens for noise, which is harder.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models

from mamba_train.config_data import DataConfig, SyntheticTask
from mamba_train.data.documents import Split
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.data.shards import write_durably
from mamba_train.data.tokenizer import END_OF_DOCUMENT, TextTokenizer

TASK_VERSION = "synthetic-1"  # change it when this file makes other samples
N_SAMPLES = 1 << 40  # more than any run reads
FIRST_SYMBOL = 0x4E00  # tokens are shown as characters from here on, of which there are 20,000 in a row
MAX_VOCAB_SIZE = 20_000
NO_LABEL = -100

Tokens = NDArray[np.int64]


class SyntheticCorpus:
    """A task as a corpus: see `mamba_train.data.corpus.Corpus` for what its attributes mean to others.

    Attributes of its own: `length` of a sample. No text is behind it: a target counts as one byte.
    """

    eos_id = None
    vocab_size: int
    n_documents = 0

    def __init__(
        self, task: SyntheticTask, vocab_size: int, items: int, length: int, split: Split, folder: Path
    ) -> None:
        self.task, self.vocab_size, self.items, self.length = task, vocab_size, items, length
        self.split: Split = split
        self.folder = folder
        self.n_tokens = self.n_bytes = N_SAMPLES * length + 1
        self.shard_hashes: set[str] = set()
        self._identity = f"{TASK_VERSION}/{task.value}/{vocab_size}/{items}/{length}/{split}"
        self.fingerprint = hashlib.sha256(self._identity.encode()).hexdigest()

    def sample(self, number: int) -> tuple[Tokens, Tokens]:
        """Inputs and labels of a sample, int64 (length,) each; NO_LABEL where nothing is asked for."""
        key = hashlib.blake2b(f"{self._identity}/{number}".encode(), digest_size=16).digest()
        # Raw bits: what numpy makes of them may differ from version to version.
        bits = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
        inputs = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, NO_LABEL, dtype=np.int64)
        _MAKERS[self.task](bits, inputs, labels, self.vocab_size, self.items)
        return inputs, labels

    def samples_at(self, starts: list[int]) -> tuple[Tokens, Tokens]:
        """Windows that begin at these tokens: tokens (rows, length + 1) and labels (rows, length)."""
        pairs = [self.sample(start // self.length) for start in starts]
        tokens = np.zeros((len(pairs), self.length + 1), dtype=np.int64)
        tokens[:, :-1] = [inputs for inputs, _ in pairs]
        return tokens, np.stack([labels for _, labels in pairs])

    @property
    def bytes_per_token(self) -> float:
        return 1.0


def _uniform(bits: Any, n: int, low: int, high: int) -> Tokens:
    """n numbers of [low, high)."""
    return (low + (bits.random_raw(n) % np.uint64(high - low)).astype(np.int64)).astype(np.int64)


def _some(bits: Any, n: int, of: int) -> Tokens:
    """n different numbers of range(of), in random order."""
    if 4 * n < of:  # a few of many are drawn faster than all are sorted
        drawn = _uniform(bits, 2 * n, 0, of)
        while len(first := np.unique(drawn, return_index=True)[1]) < n:
            drawn = np.concatenate([drawn, _uniform(bits, n, 0, of)])
        return drawn[np.sort(first)[:n]]
    return np.argsort(bits.random_raw(of), kind="stable")[:n].astype(np.int64)


def _induction_heads(bits: Any, inputs: Tokens, labels: Tokens, vocab_size: int, items: int) -> None:
    inputs[:] = _uniform(bits, len(inputs), 1, vocab_size)
    # The token after it must not be the last one, which asks.
    place = int(_uniform(bits, 1, 0, len(inputs) - 2)[0])
    inputs[place] = inputs[-1] = 0
    labels[-1] = inputs[place + 1]


def _selective_copying(bits: Any, inputs: Tokens, labels: Tokens, vocab_size: int, items: int) -> None:
    values = _uniform(bits, items, 2, vocab_size)
    inputs[np.sort(_some(bits, items, len(inputs) - items))] = values
    inputs[-items:] = 1
    labels[-items:] = values


def _mqar(bits: Any, inputs: Tokens, labels: Tokens, vocab_size: int, items: int) -> None:
    middle = vocab_size // 2
    keys = 1 + _some(bits, items, middle - 1)
    values = _uniform(bits, items, middle, vocab_size)
    inputs[0 : 2 * items : 2], inputs[1 : 2 * items : 2] = keys, values
    places = 2 * items + _some(bits, items, len(inputs) - 2 * items)
    inputs[places], labels[places] = keys, values


_MAKERS = {
    SyntheticTask.induction_heads: _induction_heads,
    SyntheticTask.selective_copying: _selective_copying,
    SyntheticTask.mqar: _mqar,
}


def task_corpus(data: DataConfig, split: Split, folder: Path, length: int | None = None) -> SyntheticCorpus:
    """The corpus that a config names; length: of its samples, if not that of the config."""
    assert data.task is not None, "config_checks asks for it"
    return SyntheticCorpus(data.task, data.vocab_size, data.task_items, length or data.sequence_length, split, folder)


def prepare_task(data: DataConfig) -> Path:
    """A folder with the tokenizer of a task, which shows each token as a character."""
    folder = Path(data.cache_dir) / f"{data.name}-{data.vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    serialised = symbols(data.vocab_size).serialised
    path = folder / TOKENIZER_NAME
    if not path.is_file() or path.read_bytes() != serialised:
        write_durably(path, serialised)
    return folder


def symbols(vocab_size: int) -> TextTokenizer:
    """A tokenizer of so many tokens, of which the first has the name of the one that ends a document."""
    vocabulary = {END_OF_DOCUMENT: 0} | {chr(FIRST_SYMBOL + i): i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    content = json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False)
    return TextTokenizer(content.encode("utf-8"), "the tokenizer of the task")
