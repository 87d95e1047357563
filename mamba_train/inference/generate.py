"""Text from a trained model, one token at a time by recurrence."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mamba_train.model.language_model import MambaLM


@torch.no_grad()
def generate(
    model: MambaLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocab_size: int,
    stop_token: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that continue `prompt`.

    The state has a constant size, so a token costs the same however long the text is. temperature 0
    takes the most likely token; top_p keeps the smallest set of tokens with that much probability
    (arXiv 1904.09751, section 3.1). Ids from `vocab_size` on are padding and are never drawn.
    Raises ValueError for an empty prompt and for logits that are not finite.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one")
    device = model.embedding.weight.device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    logits, state = model.prefill(torch.tensor([prompt], device=device), model.initial_state(1))
    for _ in range(max_new_tokens):
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
        token = _draw(logits[0, :vocab_size].float().cpu(), temperature, top_p, generator)
        if token == stop_token:
            return
        yield token
        logits, state = model.step(torch.tensor([token], device=device), state)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    # Keep a token when the mass before it is still below top_p: at least one is always kept.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    probabilities = probabilities * kept
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
