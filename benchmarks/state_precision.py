"""What a state in bf16 costs in accuracy: nats per token of a text that a trained model reads token by token.

    python -m benchmarks.state_precision RUN TEXT [--rows 16] [--tokens 4096]

RUN: what `mamba-train generate` takes; TEXT: a file. `rows` pieces of `tokens` tokens of it are read side by side by
recurrence, with matrices in fp32 and bf16 and the state in fp32, bf16 and fp16. Besides their loss, over all positions
and over the last quarter, where errors of the state have had time to grow, each line says how far its logits are from
those of fp32: the root mean square of the difference, and how often the most likely token is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_train.convert.source import load_pretrained
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.inference.load import inference_model
from mamba_train.model.language_model import MambaLM
from mamba_train.model.selective_ssm import SSMState

PRECISIONS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


@torch.no_grad()
def read(model: MambaLM, tokens: Tensor, state_dtype: torch.dtype, classes: int) -> Tensor:
    """Logits (length, row, class) after each of tokens (row, length)."""
    state = [
        SSMState(layer.conv, layer.scan.to(state_dtype)) if isinstance(layer, SSMState) else layer
        for layer in model.initial_state(len(tokens), model.embedding.weight.dtype)
    ]
    found = torch.empty(tokens.shape[1], len(tokens), classes)
    for position, token in enumerate(tokens.T):
        logits, state = model.step(token, state, in_place=True)
        found[position] = logits[:, :classes].float()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    pretrained = load_pretrained(arguments.run, print)
    if pretrained.tokenizer is None:
        raise SystemExit(f"error: {arguments.run} has no tokenizer")
    tokenizer = TextTokenizer(pretrained.tokenizer, arguments.run)
    ids = torch.as_tensor(tokenizer.encode(arguments.text.read_text(encoding="utf-8")), dtype=torch.int64)
    size = arguments.rows * (arguments.tokens + 1)
    if len(ids) < size:
        raise SystemExit(f"error: {arguments.text} has {len(ids)} tokens; {size} are needed")
    pieces = ids[:size].view(arguments.rows, -1)
    tokens, targets = pieces[:, :-1], pieces[:, 1:].T
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last = 3 * arguments.tokens // 4
    exact = None
    print(f"{arguments.rows} x {arguments.tokens} tokens on {device}; nats per token: all positions, those from {last}")
    for matrices, state in PRECISIONS:
        model = inference_model(pretrained.config, pretrained.tensors, device, matrices)
        logits = read(model, tokens.to(device), state, tokenizer.vocab_size)
        exact = logits if exact is None else exact
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        away = float((logits - exact).square().mean().sqrt())
        other = float((logits.argmax(-1) != exact.argmax(-1)).float().mean())
        print(
            f"matrices {str(matrices)[6:]:9} state {str(state)[6:]:9} {losses.mean():.5f} {losses[last:].mean():.5f}"
            f"   logits away by {away:.4f}, another token in {100 * other:.2f}%",
            flush=True,
        )


if __name__ == "__main__":
    main()
