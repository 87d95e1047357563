"""A language model: embedding, layers, norm, and the loss over a padded vocabulary."""

import dataclasses
import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_cross_entropy import linear_cross_entropy
from mamba_train.config import ModelConfig, layer_mixers
from mamba_train.model.block import Block, RMSNorm
from mamba_train.model.mixers import LayerState


def resolve_model_config(config: ModelConfig, tokenizer_vocab_size: int) -> ModelConfig:
    """Fill in what a model config leaves to the tokenizer or to a rule.

    Raises ValueError when model.vocab_size is smaller than the tokenizer's vocabulary.
    """
    vocab_size = config.vocab_size or tokenizer_vocab_size
    if vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tokenizer_vocab_size} tokens; "
            "use null or at least that many"
        )
    resolved = dataclasses.replace(
        config, vocab_size=vocab_size, dt_rank=config.dt_rank or math.ceil(config.d_model / 16)
    )
    if config.attention_heads is not None:
        resolved.attention_kv_heads = config.attention_kv_heads or config.attention_heads
        resolved.attention_head_dim = config.attention_head_dim or config.d_model // config.attention_heads
        if config.rotary_dim is None:
            resolved.rotary_dim = resolved.attention_head_dim
    return resolved


def padded_vocab_size(config: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple that matrix products like."""
    assert config.vocab_size is not None, "resolve the model config first"
    multiple = config.pad_vocab_size_multiple
    return math.ceil(config.vocab_size / multiple) * multiple


class MambaLM(nn.Module):
    """Embedding, N × (add, norm, mixer [, add, norm, MLP]), norm, and a head that is tied to the embedding by default.

    The residual stream is fp32 whatever the compute dtype. All parameters are created empty; fill
    them with `initialise_` or from a checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = padded_vocab_size(config)
        self.embedding = nn.Embedding(rows, config.d_model)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in layer_mixers(config))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """The loss, or the logits when there are no targets.

        tokens, targets: (batch, length) int64; seq_idx: (batch, length) int32, the document of each
        position, or None to let each position see all before it.
        Returns nats in fp32, summed over the targets or, by reduction="none" and without gradients, one for each
        (batch, length); or logits (batch, length, padded vocab).
        """
        hidden, residual = self.embedding(tokens), None
        for layer in self.blocks():
            hidden, residual = layer(hidden, residual, seq_idx)
        hidden, _ = self.norm(hidden, residual)
        if targets is None:
            return F.linear(hidden, self._head_weight())
        return linear_cross_entropy(hidden, self._head_weight(), targets, reduction=reduction)

    def prefill(
        self, tokens: Tensor, state: list[LayerState], seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Read a prompt (batch, length) from `state`; return the last logits (batch, vocab) and the new state.

        seq_idx: (batch, length) int32; what follows continues the document at the last position, and `state` belongs
        to the one at the first. Prompts of several lengths are padded on the left with a document of its own.
        """
        hidden = self.embedding(tokens)
        residual: Tensor | None = None
        new_state = []
        for layer, layer_state in zip(self.blocks(), state, strict=True):
            hidden, residual, layer_state = layer.prefill(hidden, residual, layer_state, seq_idx)
            new_state.append(layer_state)
        assert residual is not None, "a model has at least one layer"
        hidden, _ = self.norm(hidden[:, -1], residual[:, -1])
        return F.linear(hidden, self._head_weight()), new_state

    def step(self, token: Tensor, state: list[LayerState], in_place: bool = False) -> tuple[Tensor, list[LayerState]]:
        """One recurrent step: token (batch,), returning logits (batch, vocab) and the new state.

        in_place: the new state overwrites the one given (attention layers return another); needs torch.no_grad().
        """
        hidden, residual = self.embedding(token), None
        new_state = []
        for layer, layer_state in zip(self.blocks(), state, strict=True):
            hidden, residual, layer_state = layer.step(hidden, residual, layer_state, in_place)
            new_state.append(layer_state)
        hidden, _ = self.norm(hidden, residual)
        return F.linear(hidden, self._head_weight()), new_state

    def initial_state(self, batch_size: int, dtype: torch.dtype = torch.float32) -> list[LayerState]:
        """The state before the first token, one per layer; `dtype` is that of the activations."""
        return [block.mixer.initial_state(batch_size, dtype) for block in self.blocks()]

    def blocks(self) -> list[Block]:
        """The layers, from the first to the last."""
        return cast(list[Block], list(self.layers))

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight
