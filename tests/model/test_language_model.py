"""Each family of models: forms that must agree, documents, padding, precision."""

import pytest
import torch
from torch.nn import functional as F

from mamba_train.config import ModelConfig
from mamba_train.model.language_model import MambaLM, resolve_model_config
from tests.model.families import FAMILIES, lively, small_config


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return small_config(request.param)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 53, shape, generator=torch.Generator().manual_seed(seed))


def test_vocabulary_is_padded_and_checked(config: ModelConfig) -> None:
    assert config.vocab_size == 53
    assert MambaLM(config).embedding.weight.shape == (64, 40)
    with pytest.raises(ValueError, match=r"model\.vocab_size=50"):
        resolve_model_config(ModelConfig(name="x", n_layer=1, d_model=8, vocab_size=50), tokenizer_vocab_size=53)


def test_loss_is_the_cross_entropy_of_the_logits(perturbed_model: MambaLM) -> None:
    tokens = random_tokens(2, 20)
    logits = perturbed_model(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(perturbed_model(tokens[:, :-1], tokens[:, 1:]), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 65])
@torch.no_grad()
def test_steps_equal_forward(perturbed_model: MambaLM, length: int) -> None:
    tokens = random_tokens(2, length)
    expected = perturbed_model(tokens)
    state = perturbed_model.initial_state(2)
    for position in range(length):
        logits, state = perturbed_model.step(tokens[:, position], state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prefill_then_step_equals_forward(perturbed_model: MambaLM) -> None:
    tokens = random_tokens(2, 12)
    expected = perturbed_model(tokens)
    logits, state = perturbed_model.prefill(tokens[:, :5], perturbed_model.initial_state(2))
    torch.testing.assert_close(logits, expected[:, 4], rtol=1e-4, atol=1e-4)
    logits, state = perturbed_model.prefill(tokens[:, 5:9], state)
    torch.testing.assert_close(logits, expected[:, 8], rtol=1e-4, atol=1e-4)
    logits, _ = perturbed_model.step(tokens[:, 9], state)
    torch.testing.assert_close(logits, expected[:, 9], rtol=1e-4, atol=1e-4)


def test_a_document_does_not_see_the_one_before_it(perturbed_model: MambaLM) -> None:
    """Packed equals separate, in the loss and in every gradient."""
    first, second = random_tokens(1, 9, seed=1), random_tokens(1, 14, seed=2)
    packed = torch.cat([first, second], dim=1)
    seq_idx = torch.tensor([[0] * 9 + [1] * 14], dtype=torch.int32)
    targets = packed.roll(1)

    def gradients(*losses: torch.Tensor) -> list[torch.Tensor]:
        perturbed_model.zero_grad()
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in perturbed_model.parameters()]

    together = gradients(perturbed_model(packed, targets, seq_idx))
    apart = gradients(perturbed_model(first, targets[:, :9]), perturbed_model(second, targets[:, 9:]))
    leaking = gradients(perturbed_model(packed, targets))
    # Numbers may come again: only a change of them matters.
    again = torch.tensor([[3] * 9 + [0] * 14], dtype=torch.int32)
    torch.testing.assert_close(perturbed_model(packed, targets, again), perturbed_model(packed, targets, seq_idx))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
    assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(together, leaking, strict=True))


def test_bf16_autocast_keeps_the_ssm_parameters_and_the_residual_in_fp32(perturbed_model: MambaLM) -> None:
    tokens = random_tokens(2, 20)
    exact = perturbed_model(tokens)
    seen = []
    perturbed_model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = perturbed_model(tokens)
    assert rounded.dtype is torch.bfloat16
    assert seen == [torch.float32]
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_tokens_through_step_and_through_the_parallel_form(family: str) -> None:
    """Two hundred of them, so that a small error of the state would show."""
    model = lively(family)
    seen = set()
    for prompt in ([5, 9, 2], [7], [1, 1, 2, 3, 5, 8, 13, 21, 34]):
        logits, state = model.prefill(torch.tensor([prompt]), model.initial_state(1))
        tokens = [*prompt, int(logits.argmax())]
        while len(tokens) < len(prompt) + 200:
            logits, state = model.step(torch.tensor(tokens[-1:]), state)
            tokens.append(int(logits.argmax()))
        # Teacher-forced: the parallel form picks the same token at each position.
        picked = model(torch.tensor([tokens]))[0].argmax(-1)
        assert picked[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]
        seen |= set(tokens)
    assert len(seen) > 15, "text that repeats itself proves nothing"


def test_torch_compile_breaks_no_graph(perturbed_model: MambaLM) -> None:
    tokens = random_tokens(2, 20)
    compiled = torch.compile(perturbed_model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), perturbed_model(tokens[:, :-1], tokens[:, 1:]))
