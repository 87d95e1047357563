"""Text that grows with its tokens, and ends at a stop string."""

from collections.abc import Callable, Sequence

import torch

from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.inference.generate import generate
from mamba_train.inference.sampling import Sampling
from mamba_train.model.language_model import MambaLM

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
CHARACTER_BYTES = 4  # of UTF-8, at most
MAX_PENDING = 16  # tokens that may be part of a character; a model can write bytes that never make one
CONTEXT_TOKENS = 8  # some tokenizers write a token in another way at the beginning of a text


class TextStream:
    """Turns the tokens of one text into characters as soon as these are certain.

    Held back are a character of which only some bytes are there, and an end that may become a stop string. Each token
    costs the same however long the text is. Attributes: `text` so far; `stopped`, whether a stop string came, which is
    not part of the text.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, [stop for stop in stop_strings if stop]
        self._context = list(prompt[-CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next token; return the characters that are certain now."""
        self._pending.append(token)
        new, certain = self._decoded(self._pending), len(self._pending)
        if new.endswith(REPLACEMENT):
            certain = self._certain(new) if certain >= MAX_PENDING else 0
            if not certain:
                return ""
            new = self._decoded(self._pending[:certain])
        self._context = [*self._context, *self._pending[:certain]][-CONTEXT_TOKENS:]
        del self._pending[:certain]
        return self._accept(new, at_end=False)

    def finish(self) -> str:
        """The characters held back so far, as no further token will come."""
        new = self._decoded(self._pending) if self._pending else ""
        self._pending = []
        return self._accept(new, at_end=True)

    def _certain(self, text: str) -> int:
        """How many of the pending tokens, whose text this is, no further token can change; 0: unknown."""
        # What is incomplete before the last three bytes is complete or broken by now, unless a token is cut in two.
        last = len(self._pending) - (CHARACTER_BYTES - 1)
        return next((n for n in range(last, 0, -1) if text.startswith(self._decoded(self._pending[:n]))), 0)

    def _decoded(self, tokens: Sequence[int]) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *tokens])[len(before) :]

    def _accept(self, new: str, at_end: bool) -> str:
        if self.stopped:
            return ""
        candidate = self._held + new
        places = [place for stop in self._stop_strings if (place := candidate.find(stop)) >= 0]
        if places:
            self.stopped = True
            candidate, hold = candidate[: min(places)], 0
        else:
            hold = 0 if at_end else self._possible_beginning(candidate)
        certain, self._held = candidate[: len(candidate) - hold], candidate[len(candidate) - hold :]
        self.text += certain
        return certain

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop_strings)), 0)


def generate_text(
    model: MambaLM,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
    state_dtype: torch.dtype | None = None,
) -> list[str]:
    """The text that continues each of the prompts (tokens); on_text(row, new characters) is called as it grows.

    A text ends before the token that ends a document, before the first stop string, or after `max_new_tokens`.
    state_dtype: see `Decoder`.
    """
    streams = [TextStream(tokenizer, prompt, stop_strings) for prompt in prompts]

    def on_token(row: int, token: int) -> bool:
        on_text(row, streams[row].push(token))
        return streams[row].stopped

    generate(
        model,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        stop_token=tokenizer.eos_id,
        on_token=on_token,
        state_dtype=state_dtype,
    )
    for row, stream in enumerate(streams):
        on_text(row, stream.finish())
    return [stream.text for stream in streams]
