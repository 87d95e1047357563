"""The tokenizer: a byte-level BPE trained here, or any `tokenizer.json` of the user's."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba_train.data.text_files import BASES

END_OF_DOCUMENT = "<|endoftext|>"
# Names that published tokenizers give to the token that ends a document, most specific first.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<EOS>")
MIN_VOCAB_SIZE = 257  # every byte and the end of a document
MAX_TRAINING_BYTES = 200_000_000
MAX_PIECE_CHARACTERS = 100_000
MAX_CALL_CHARACTERS = 2_000_000  # encoded by one call; takes some 400 bytes of memory per token
# Where the pre-tokenizer of GPT-2 always ends a word, whatever stands around: after a single line feed and before a
# single space between two characters that are not white space, and between a letter and a digit. No canonical
# composition (NFC) reaches over these places either.
PIECE_END = re.compile(r"\S\n(?=\S)|\S(?= \S)|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])")
NO_TOKEN = 2**16 - 1
EncodeCall = Callable[[list[str]], list[np.ndarray]]


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
        self._dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)
        self.sha256 = hashlib.sha256(serialised).hexdigest()
        self.serialised = serialised
        definition = json.loads(serialised)
        self._may_cut = _may_cut(definition)
        self._characters = _character_table(definition)
        if self._characters is None and self.eos_id in self.encode(f"a{name}b {name}"):
            raise ValueError(
                f"{where}: the text {name!r} encodes to the end-of-document id {self.eos_id}; "
                'mark that token as "special": true in its added_tokens'
            )

    def encode(self, text: str) -> np.ndarray:
        """Token ids (integers) of one text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], encode_call: EncodeCall | None = None) -> list[np.ndarray]:
        """Token ids (integers) of each text, without end-of-document tokens.

        encode_call: encodes a list of short texts in the place of this tokenizer. Raises ValueError for
        a character outside a vocabulary that consists of single characters.
        """
        if self._characters is not None:
            return [_look_up(self._characters, text) for text in texts]
        call = encode_call or self._encode_call
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        group: list[str] = []
        owners: list[int] = []
        characters = 0
        for owner, text in enumerate(texts):
            for piece in _pieces(text) if self._may_cut else [text]:
                group.append(piece)
                owners.append(owner)
                characters += len(piece)
                if characters >= MAX_CALL_CHARACTERS:
                    self._deal(call(group), owners, parts)
                    group, owners, characters = [], [], 0
        self._deal(call(group), owners, parts)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in parts]

    def _encode_call(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _deal(self, found: list[np.ndarray], owners: list[int], parts: list[list[np.ndarray]]) -> None:
        """Append the ids of pieces to those of the texts that they come from."""
        for owner, ids in zip(owners, found, strict=True):
            parts[owner].append(ids.astype(self._dtype))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; ids outside the vocabulary (padding of the embedding) give nothing."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def n_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of token ids, of any shape; end-of-document tokens count nothing.

        Exact for byte-level tokenizers, also where the ids begin or end inside a character; with others that takes
        part of a character for three bytes.
        """
        if self._bytes_of_ids is None:
            return len(self.decode(ids[ids != self.eos_id]).encode("utf-8"))
        return int(np.take(self._bytes_of_ids, ids, mode="clip").sum())

    @cached_property
    def _bytes_of_ids(self) -> np.ndarray | None:
        """Bytes of each id if the tokenizer writes each byte as a letter of its vocabulary, else None.

        (vocab_size + 1,): 0 for the end of a document, and at the end 0 for all ids outside the vocabulary.
        """
        definition = json.loads(self.serialised)
        if (definition.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        sizes = np.zeros(self.vocab_size + 1, dtype=np.int64)
        for token, i in definition["model"]["vocab"].items():
            sizes[i] = len(token)
        for token in definition.get("added_tokens") or []:
            sizes[token["id"]] = len(token["content"].encode("utf-8"))
        sizes[self.eos_id] = 0
        return sizes


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text where the pre-tokenizer would cut it too, so that the ids do not change.

    The library takes hundreds of bytes of memory per token, which must not grow with the text. A text
    without such a place stays whole.
    """
    start = 0
    while len(text) - start > MAX_PIECE_CHARACTERS:
        place = PIECE_END.search(text, start + MAX_PIECE_CHARACTERS // 2)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:] if start else text


def _may_cut(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of the kind for which `PIECE_END` was proved: GPT-2's pre-tokenizer.

    Tokens added to it must not reach over a place where a text is cut: runs of spaces do not, nor do special
    ones, which are not looked for.
    """
    before = definition.get("pre_tokenizer") or {}
    is_gpt2 = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
    keeps_text = (definition.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
    added = [token for token in definition.get("added_tokens") or [] if not token["special"]]
    are_runs = all(
        set(token["content"]) == {" "}
        and len(token["content"]) > 1
        and not (token["lstrip"] or token["rstrip"] or token["single_word"])
        for token in added
    )
    return is_gpt2 and keeps_text and are_runs


def _character_table(definition: dict[str, Any]) -> np.ndarray | None:
    """Id of each of 256 bytes (or NO_TOKEN) if the tokenizer only knows single ASCII characters, else None.

    A chromosome is one word of hundreds of millions of letters, for which the library is no tool.
    """
    model = definition["model"]
    is_plain = model["type"] == "BPE" and not model["merges"]
    special = {token["content"] for token in definition.get("added_tokens") or []}
    single = {token: i for token, i in model["vocab"].items() if token not in special} if is_plain else {}
    if not single or definition.get("normalizer") or definition.get("pre_tokenizer"):
        return None
    if not all(len(token) == 1 and token.isascii() for token in single):
        return None
    table = np.full(256, NO_TOKEN, dtype=np.uint16)  # small: a chromosome has a quarter of a billion bases
    for token, i in single.items():
        table[ord(token)] = i
    return table


def _look_up(table: np.ndarray, text: str) -> np.ndarray:
    ids: np.ndarray = table[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)]
    if (ids == NO_TOKEN).any():
        character = next(c for c in text if not c.isascii() or table[ord(c)] == NO_TOKEN)
        raise ValueError(f"the character {character!r} is not in the vocabulary")
    return ids


def dna_tokenizer() -> TextTokenizer:
    """One token per base: id 0 ends a sequence, 1 to 4 are A, C, G, T, then the other letters of `BASES`."""
    vocabulary = {token: i for i, token in enumerate([END_OF_DOCUMENT, *BASES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return TextTokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), "the tokenizer of DNA")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_bytes: int | None = None, option: str = "data.vocab_size"
) -> TextTokenizer:
    """Train a byte-level BPE on the first `max_bytes` (null: `MAX_TRAINING_BYTES`) of `texts`.

    Id 0 is `END_OF_DOCUMENT`; the 256 bytes are always in the vocabulary, so any text can be encoded
    and decoded without loss. The same texts give the same tokenizer.json, byte for byte. A small
    corpus may have fewer than `vocab_size` distinct tokens. Raises ValueError that begins with `option`.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"{option}={vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} "
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
    tokenizer.train_from_iterator(_first_bytes(texts, max_bytes or MAX_TRAINING_BYTES), trainer)
    return TextTokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), "the tokenizer just trained")


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        if n_bytes >= limit:
            return
        yield from _pieces(text[: limit - n_bytes])
        n_bytes += len(text.encode("utf-8"))


def load_tokenizer(path: Path | str, option: str = "data.tokenizer") -> TextTokenizer:
    """Read a tokenizer.json. Raises ValueError that names `option` and the file."""
    where = f"{option}={path}"
    try:
        serialised = Path(path).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such file") from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror})") from error
    return TextTokenizer(serialised, where)
