"""Tokens by recurrence, in batches of prompts of several lengths, against the parallel form."""

import pytest
import torch

from mamba_train.inference.decoder import Decoder
from mamba_train.inference.generate import generate
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from mamba_train.model.language_model import MambaLM
from mamba_train.model.selective_ssm import SSMState
from tests.model.families import FAMILIES, lively

VOCAB = 53
GREEDY = Sampling(temperature=0)
PROMPT = [5, 9, 2]
RAGGED = [[5, 9, 2], [7], [1, 1, 2, 3, 5, 8, 13, 21, 34], [40, 3]]


@pytest.fixture(scope="module")
def model() -> MambaLM:
    model = lively("mamba1").requires_grad_(False)
    model.lm_head.weight[VOCAB:] *= 100  # padding would win if it were allowed to
    return model


def continued(model: MambaLM, prompts: list[list[int]], sampling: Sampling, n: int = 40) -> list[list[int]]:
    return generate(model, prompts, sampling, max_new_tokens=n, vocab_size=VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_ragged_batch_are_those_of_the_parallel_form(family: str) -> None:
    """Each prompt in the batch, alone, and by the whole text at once: three ways to the same tokens."""
    model = lively(family).requires_grad_(False)
    together = continued(model, RAGGED, GREEDY, 100)
    seen = set()
    for prompt, tokens in zip(RAGGED, together, strict=True):
        assert continued(model, [prompt], GREEDY, 100) == [tokens]
        # Teacher-forced: the parallel form picks the same token at each position.
        picked = model(torch.tensor([prompt + tokens]))[0, :, :VOCAB].argmax(-1)
        assert picked[len(prompt) - 1 : -1].tolist() == tokens
        seen |= set(tokens)
    assert len(seen) > 15, "text that repeats itself proves nothing"


def test_a_text_does_not_depend_on_the_batch_it_is_in(model: MambaLM) -> None:
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4)
    together = continued(model, RAGGED, sampling)
    for row, prompt in enumerate(RAGGED):
        alone = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4 + row)
        assert continued(model, [prompt], alone) == [together[row]]


def test_a_seed_gives_the_same_text_and_another_seed_another(model: MambaLM) -> None:
    def draw(seed: int) -> list[list[int]]:
        return continued(model, [PROMPT], Sampling(temperature=2.0, seed=seed))

    assert draw(0) == draw(0) != draw(1)
    assert all(0 <= token < VOCAB for token in draw(2)[0]), "padding is never drawn"


def test_each_row_ends_before_its_stop_token_or_when_it_is_told_to(model: MambaLM) -> None:
    greedy = continued(model, RAGGED, GREEDY)
    stop = greedy[0][4]
    until = generate(model, RAGGED, GREEDY, max_new_tokens=40, vocab_size=VOCAB, stop_token=stop)
    for free, stopped in zip(greedy, until, strict=True):
        assert stopped == (free[: free.index(stop)] if stop in free else free)
    calls: list[tuple[int, int]] = []

    def third_of_row_1(row: int, token: int) -> bool:
        calls.append((row, token))
        return row == 1 and sum(row == 1 for row, _ in calls) == 3

    told = generate(model, RAGGED, GREEDY, max_new_tokens=40, vocab_size=VOCAB, on_token=third_of_row_1)
    assert told == [greedy[0], greedy[1][:3], *greedy[2:]]
    assert [token for row, token in calls if row == 2] == greedy[2], "tokens are told as they come"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("hybrid", "transformer")])
@torch.no_grad()
def test_the_state_has_a_constant_size(family: str) -> None:
    model = lively(family)

    def size(n: int) -> int:
        _, state = model.prefill(torch.ones(2, n, dtype=torch.int64), model.initial_state(2))
        _, state = model.step(torch.tensor([1, 2]), state)
        return sum(layer.conv.numel() + layer.scan.numel() for layer in state)

    assert size(3) == size(300)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "hybrid"])
@torch.no_grad()
def test_a_state_kept_in_bf16_is_rounded_and_no_more(family: str) -> None:
    model = lively(family)
    exact, rounded = (Decoder(model, RAGGED, state_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    tokens = torch.tensor([1, 2, 3, 4])
    found = torch.stack([rounded.step(tokens).clone() for _ in range(20)])
    expected = torch.stack([exact.step(tokens).clone() for _ in range(20)])
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "hybrid"])
@torch.no_grad()
def test_in_which_dtype_a_state_is_kept(family: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cpu"), dtype)
    default, asked = Decoder(model, RAGGED), Decoder(model, RAGGED, state_dtype=kept)
    tokens = torch.tensor([1, 2, 3, 4])
    for _ in range(3):
        assert torch.equal(default.step(tokens), asked.step(tokens))
    assert {layer.scan.dtype for layer in default._state if isinstance(layer, SSMState)} == {kept}


def test_wrong_prompts_and_broken_weights_are_said(model: MambaLM) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        continued(model, [PROMPT, []], GREEDY)
    broken = lively("mamba2").requires_grad_(False)
    broken.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        continued(broken, [PROMPT], GREEDY)
    with pytest.raises(ValueError, match="cuda_graph"):
        generate(model, [PROMPT], GREEDY, max_new_tokens=1, vocab_size=VOCAB, cuda_graph=True)
