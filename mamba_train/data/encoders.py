"""Which library turns text into ids: `tokenizers`, the reference, or `fastokens`, checked against it.

fastokens is some twenty times faster and young, so what it encodes is checked: in every group of files the
ids of the first documents of each domain (the beginning of each shard) and of a spread of later ones must be
those of the reference.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np

from mamba_train.data.text_files import TextRecord
from mamba_train.data.tokenizer import EncodeCall, TextTokenizer

CHECKED_FIRST = 16  # documents of a domain
CHECKED_EVERY = 512  # documents of the group, besides; costs the fast encoder about 4% of its speed
CHECKED_CHARACTERS = 200_000  # of a checked document


class EncoderMismatch(Exception):
    """The fast encoder gave other ids than the reference; the message says for which document."""


class Encoder(Protocol):
    """Encodes the documents of one group, in their order."""

    name: str  # with its version, for the records

    def encode(self, records: Sequence[TextRecord]) -> list[np.ndarray]:
        """Token ids of each text, without end-of-document tokens."""


class ReferenceEncoder:
    """`tokenizers`, or a table where the vocabulary consists of single characters."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = f"tokenizers {version('tokenizers')}"

    def encode(self, records: Sequence[TextRecord]) -> list[np.ndarray]:
        """Token ids of each text."""
        return self._tokenizer.encode_batch([record.text for record in records])


class CheckedEncoder:
    """A fast encoder whose ids are compared with the reference's on some documents."""

    def __init__(self, tokenizer: TextTokenizer, name: str, fast: EncodeCall) -> None:
        self._tokenizer, self._fast = tokenizer, fast
        self.name = name
        self._n_documents = 0
        self._n_of_domain: Counter[str] = Counter()

    def encode(self, records: Sequence[TextRecord]) -> list[np.ndarray]:
        """Token ids of each text. Raises EncoderMismatch if the check finds another id, or the encoder fails."""
        try:
            found = self._tokenizer.encode_batch([record.text for record in records], self._fast)
        except Exception as error:  # whatever a young library raises: the reference may still do it
            raise EncoderMismatch(
                f"after {self._n_documents} documents of the group, {self.name} fails ({error})"
            ) from error
        for record, ids in zip(records, found, strict=True):
            if self._n_of_domain[record.label] < CHECKED_FIRST or self._n_documents % CHECKED_EVERY == 0:
                self._check(record.text, ids)
            self._n_documents += 1
            self._n_of_domain[record.label] += 1
        return found

    def _check(self, text: str, ids: np.ndarray) -> None:
        if len(text) > CHECKED_CHARACTERS:
            text = text[:CHECKED_CHARACTERS]
            ids = self._tokenizer.encode_batch([text], self._fast)[0]
        expected = self._tokenizer.encode_batch([text])[0]
        if not np.array_equal(ids, expected):
            n = min(len(ids), len(expected))
            different = np.flatnonzero(ids[:n] != expected[:n])
            place = int(different[0]) if len(different) else n
            raise EncoderMismatch(
                f"document {self._n_documents + 1} of the group, token {place}: {self.name} gives "
                f"{ids[place : place + 3].tolist()}, the reference {expected[place : place + 3].tolist()}"
            )


def fastokens_call(tokenizer: TextTokenizer) -> EncodeCall:
    """Encode with fastokens. Raises ValueError if it is not installed or cannot read the tokenizer."""
    try:
        from fastokens import Tokenizer
    except ImportError as error:
        raise ValueError(
            "--encoder fastokens: the package is not installed; pip install -e '.[fastokens]', or leave the option out"
        ) from error
    try:
        fast = Tokenizer.from_json_str(tokenizer.serialised.decode("utf-8"))
    except Exception as error:  # whatever its parser raises
        raise ValueError(f"--encoder fastokens: it cannot read this tokenizer ({error})") from error
    fast.no_truncation()
    fast.no_padding()

    def encode(texts: list[str]) -> list[np.ndarray]:
        # The names of special tokens in a text are ordinary text.
        data, offsets = fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        ids = np.frombuffer(data, dtype="<u4")
        ends = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return [ids[ends[i] : ends[i + 1]] for i in range(len(texts))]

    return encode


def make_encoder(tokenizer: TextTokenizer, fast: EncodeCall | None) -> Encoder:
    """A fresh encoder for one group; fast: what `fastokens_call` returned, None for the reference."""
    if fast is None:
        return ReferenceEncoder(tokenizer)
    return CheckedEncoder(tokenizer, f"fastokens {version('fastokens')}", fast)
