"""The tokenizer: a byte-level BPE trained here, or any `tokenizer.json` of the user's."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"
# Names that published tokenizers give to the token that ends a document, most specific first.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<EOS>")
MIN_VOCAB_SIZE = 257  # every byte and the end of a document
MAX_TRAINING_BYTES = 200_000_000
MAX_PIECE_CHARACTERS = 100_000
MAX_CALL_CHARACTERS = 2_000_000  # encoded by one call; takes some 400 bytes of memory per token
PIECE_END = re.compile(r"\S\n(?=\S)")


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what the shards need to know about it.

    Attributes: `eos_id`, the id of the end-of-document token; `vocab_size`, one more than the largest
    id; `sha256` of the tokenizer.json.
    """

    def __init__(self, serialised: bytes, where: str) -> None:
        """Read the contents of a tokenizer.json; `where` names it in messages. Raises ValueError."""
        try:
            # The library raises a bare Exception for whatever is wrong with the file.
            self._tokenizer = Tokenizer.from_buffer(serialised)
        except Exception as error:
            raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that contains the characters of a special token must not become that token: the
        # state of the model would be reset in the middle of a document.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        name = next((name for name in END_OF_DOCUMENT_NAMES if name in vocabulary), None)
        if name is None:
            raise ValueError(f"{where}: no end-of-document token; expected one of {', '.join(END_OF_DOCUMENT_NAMES)}")
        self.eos_id: int = vocabulary[name]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(serialised).hexdigest()
        self.serialised = serialised
        # Some tokenizers treat the beginning of a text in a way of its own: theirs must stay whole.
        whole, *parts = self._encode_call(["a\nb", "a\n", "b"])
        self._may_cut = np.array_equal(whole, np.concatenate(parts))
        if self.eos_id in self.encode(f"a{name}b {name}"):
            raise ValueError(
                f"{where}: the text {name!r} encodes to the end-of-document id {self.eos_id}; "
                'mark that token as "special": true in its added_tokens'
            )

    def encode(self, text: str) -> np.ndarray:
        """Token ids (int64) of one text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int64) of each text, encoded in parallel, without end-of-document tokens."""
        pieces = [list(_pieces(text)) if self._may_cut else [text] for text in texts]
        ids = self._encode_pieces(piece for parts in pieces for piece in parts)
        return [np.concatenate([next(ids) for _ in parts]) for parts in pieces]

    def _encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids (int64) of each piece, with a bounded number of characters per call."""
        group: list[str] = []
        characters = 0
        for piece in pieces:
            group.append(piece)
            characters += len(piece)
            if characters >= MAX_CALL_CHARACTERS:
                yield from self._encode_call(group)
                group, characters = [], 0
        yield from self._encode_call(group)

    def _encode_call(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; ids outside the vocabulary (padding of the embedding) give nothing."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def n_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of token ids (n,); end-of-document tokens count nothing."""
        return len(self.decode(ids[ids != self.eos_id]).encode("utf-8"))


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text where a byte-level pre-tokenizer would cut it too.

    That is after a single line break, so that the ids do not change: the library takes hundreds of
    bytes of memory per token, which must not grow with the text. A text without such a place stays whole.
    """
    start = 0
    while len(text) - start > MAX_PIECE_CHARACTERS:
        place = PIECE_END.search(text, start + MAX_PIECE_CHARACTERS // 2)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE on the first `MAX_TRAINING_BYTES` of `texts`.

    Id 0 is `END_OF_DOCUMENT`; the 256 bytes are always in the vocabulary, so any text can be encoded
    and decoded without loss. The same texts give the same tokenizer.json, byte for byte. A small
    corpus may have fewer than `vocab_size` distinct tokens. Raises ValueError (`data.vocab_size`).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"data.vocab_size={vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} "
            "(every byte and the end of a document)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, MAX_TRAINING_BYTES), trainer)
    return TextTokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), "the tokenizer just trained")


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        if n_bytes >= limit:
            return
        yield from _pieces(text[: limit - n_bytes])
        n_bytes += len(text.encode("utf-8"))


def load_tokenizer(path: Path | str) -> TextTokenizer:
    """Read a tokenizer.json. Raises ValueError that names `data.tokenizer` and the file."""
    where = f"data.tokenizer={path}"
    try:
        serialised = Path(path).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such file") from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror})") from error
    return TextTokenizer(serialised, where)
