import pytest
import torch

from mamba_train.config import ModelConfig
from mamba_train.inference.generate import generate
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config

VOCAB = 53
PROMPT = [5, 9, 2]


@pytest.fixture(scope="module")
def model() -> MambaLM:
    config = ModelConfig(name="test", n_layer=2, d_model=24, d_state=4, pad_vocab_size_multiple=64)
    config = resolve_model_config(config, VOCAB)
    model = MambaLM(config)
    initialise_(model, config, seed=0)
    with torch.no_grad():
        model.embedding.weight *= 30  # far from uniform, so that the most likely token is a clear one
        model.embedding.weight[VOCAB:] *= 100  # padding rows would win if they were allowed to
    return model


def test_greedy_tokens_are_those_of_the_forward_pass(model: MambaLM) -> None:
    """The recurrence against the whole text at once, token by token."""
    tokens = list(PROMPT)
    expected = []
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([tokens]))[0, -1, :VOCAB].argmax()))
            tokens.append(expected[-1])
    drawn = generate(model, PROMPT, max_new_tokens=12, temperature=0, vocab_size=VOCAB)
    assert list(drawn) == expected


def test_a_seed_gives_the_same_text_and_another_seed_another(model: MambaLM) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_new_tokens=40, temperature=2.0, vocab_size=VOCAB, seed=seed))

    assert draw(0) == draw(0) != draw(1)
    assert all(0 <= token < VOCAB for token in draw(2)), "padding is never drawn"


def test_top_p_keeps_the_most_likely_tokens_only(model: MambaLM) -> None:
    greedy = list(generate(model, PROMPT, max_new_tokens=10, temperature=0, vocab_size=VOCAB))
    narrow = list(generate(model, PROMPT, max_new_tokens=10, temperature=1, top_p=1e-6, vocab_size=VOCAB, seed=3))
    assert narrow == greedy


def test_stops_before_the_stop_token(model: MambaLM) -> None:
    greedy = list(generate(model, PROMPT, max_new_tokens=10, temperature=0, vocab_size=VOCAB))
    stop = greedy[4]
    until = list(generate(model, PROMPT, max_new_tokens=10, temperature=0, vocab_size=VOCAB, stop_token=stop))
    assert until == greedy[: greedy.index(stop)]


def test_an_empty_prompt_is_refused(model: MambaLM) -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(generate(model, [], max_new_tokens=1, vocab_size=VOCAB))
