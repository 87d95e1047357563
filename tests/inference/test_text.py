"""Characters come when they are certain, and all of them come."""

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.data.tokenizer import TextTokenizer, train_tokenizer
from mamba_train.inference.sampling import Sampling
from mamba_train.inference.text import CONTEXT_TOKENS, MAX_PENDING, REPLACEMENT, TextStream, generate_text
from tests.model.families import lively


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["the naïve cat — sat on the mat, 漢字 and all; the end of the text"] * 3, 300)


def pushed(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_pieces_make_the_text_up_to_the_first_stop_string(
    tokenizer: TextTokenizer, text: str, stops: list[str]
) -> None:
    tokens = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer, stop_strings=stops)
    pieces = pushed(stream, tokens)
    whole = tokenizer.decode(tokens)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    # A text that ends inside a character has a replacement in its place, which is not certain before the end.
    assert "".join(pieces) == stream.text == (whole[: min(places)] if places else whole)
    assert stream.stopped == bool(places)


@given(st.lists(st.integers(0, 299), max_size=60))
def test_bytes_that_make_no_character_come_too_and_each_costs_the_same(
    tokenizer: TextTokenizer, tokens: list[int]
) -> None:
    broken = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == REPLACEMENT)
    tokens = [*tokens, *[broken] * 40, *tokens]
    sizes = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            sizes.append(len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(cast(TextTokenizer, Counting()))
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces).count(REPLACEMENT) >= 20, "they come as the text grows"
    assert "".join([*pieces, stream.finish()]) == stream.text == tokenizer.decode(tokens)
    assert max(sizes) <= MAX_PENDING + CONTEXT_TOKENS


def test_half_a_character_and_half_a_stop_string_are_held_back(tokenizer: TextTokenizer) -> None:
    bytes_of = tokenizer.encode("\U0001f40d").tolist()
    assert len(bytes_of) == 4
    assert pushed(TextStream(tokenizer), bytes_of) == ["", "", "", "\U0001f40d", ""]
    letters = [int(tokenizer.encode(letter)[0]) for letter in "xENy"]
    assert pushed(TextStream(tokenizer, stop_strings=["END"]), letters) == ["x", "", "", "ENy", ""]
    letters = [int(tokenizer.encode(letter)[0]) for letter in "xEND"]
    assert pushed(TextStream(tokenizer, stop_strings=["END"]), letters) == ["x", "", "", "", ""]


def test_the_first_of_two_stop_strings_in_one_token_ends_the_text(tokenizer: TextTokenizer) -> None:
    token = next(
        i for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i])).isalpha() and len(set(text)) > 1
    )
    text = tokenizer.decode([token])
    stops = [text[-1], text[1], text[0]]
    assert pushed(TextStream(tokenizer, stop_strings=stops), [token]) == ["", ""]
    assert pushed(TextStream(tokenizer, stop_strings=stops[:2]), [token]) == [text[0], ""]


def test_texts_of_a_batch_are_told_as_they_grow_and_end_at_the_stop_string(tokenizer: TextTokenizer) -> None:
    model = lively("mamba1").requires_grad_(False)
    prompts = [[5, 9, 2], [7]]
    told = ["", ""]

    def on_text(row: int, text: str) -> None:
        told[row] += text

    # Its vocabulary is smaller than the tokenizer's, so every token that it chooses is one of those.
    greedy = Sampling(temperature=0)
    texts = generate_text(model, tokenizer, prompts, greedy, max_new_tokens=30, on_text=on_text)
    assert texts == told
    exact, rounded = (
        generate_text(model, tokenizer, [[7]] * 20, Sampling(temperature=2.0), max_new_tokens=100, state_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact != rounded
    stop = texts[1][2:4]
    short = generate_text(model, tokenizer, prompts, greedy, max_new_tokens=30, stop_strings=[stop])
    assert short == [text.split(stop)[0] for text in texts]
    assert len(short[1]) == 2
