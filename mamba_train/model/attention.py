"""Causal self-attention with rotary positions, and the cache of keys and values that it decodes from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from mamba_train.config import ModelConfig

ROTARY_BASE = 10000.0


@dataclass
class KVState:
    """What an attention layer remembers: everything, so it grows with the text.

    keys, values: (batch, kv_head, positions so far, head_dim), keys already rotated.
    conv: (batch, d_conv - 1, channels of in_proj), the last inputs of the convolution; None without one.
    documents: (batch, positions so far) int32, the document of each; None where all are of one.
    """

    keys: Tensor
    values: Tensor
    conv: Tensor | None
    documents: Tensor | None = None


class AttentionMixer(nn.Module):
    """in_proj to queries, keys and values, an optional causal convolution, attention, out_proj.

    Fewer heads of keys and values than of queries are shared evenly (arXiv 2305.13245). The
    convolution has no activation. Scores are scaled by 1/sqrt(head_dim).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.attention_heads, config.attention_kv_heads, config.attention_head_dim
        assert heads is not None, "config_checks asks for it"
        assert kv_heads is not None, "resolve the model config first"
        assert head_dim is not None, "resolve the model config first"
        assert config.rotary_dim is not None, "resolve the model config first"
        self.head_dim, self.rotary_dim = head_dim, config.rotary_dim
        self.split_sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        channels = sum(self.split_sizes)
        self.in_proj = nn.Linear(config.d_model, channels, bias=False)
        self.conv_weight = self.conv_bias = None
        if config.attention_d_conv:
            self.conv_weight = nn.Parameter(torch.empty(channels, config.attention_d_conv))
            self.conv_bias = nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(heads * head_dim, config.d_model, bias=False)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """hidden: (batch, length, d_model); seq_idx: (batch, length) int32, documents that do not see each other."""
        qkv = self.in_proj(hidden)
        if self.conv_weight is not None:
            qkv = causal_conv1d(qkv, self.conv_weight, self.conv_bias, seq_idx=seq_idx)
        # Only distances between positions matter, so positions need not start over at a document.
        q, k, v = self._heads(qkv, first_position=0)
        mask = None if seq_idx is None else _same_document(seq_idx, seq_idx.shape[1]).tril_()
        return self._attend(q, k, v, mask)

    def prefill(self, hidden: Tensor, state: KVState, seq_idx: Tensor | None = None) -> tuple[Tensor, KVState]:
        """As forward, after the positions in `state`, also returning the state with the new ones.

        Without seq_idx the new positions continue the last document.
        """
        qkv, conv = self.in_proj(hidden), state.conv
        if self.conv_weight is not None:
            qkv, conv = causal_conv1d(
                qkv, self.conv_weight, self.conv_bias, seq_idx=seq_idx, initial_state=conv, return_final_state=True
            )
        past, length = state.keys.shape[2], hidden.shape[1]
        q, k, v = self._heads(qkv, first_position=past)
        documents = _with_new(state.documents, past, seq_idx, length)
        keys, values = torch.cat([state.keys.to(k), k], dim=2), torch.cat([state.values.to(v), v], dim=2)
        mask = None
        if documents is not None:
            mask = _same_document(documents, length).tril_(past)
        elif past:
            mask = torch.ones(length, past + length, dtype=torch.bool, device=hidden.device).tril_(past)
        return self._attend(q, keys, values, mask), KVState(keys, values, conv, documents)

    def step(self, hidden: Tensor, state: KVState, in_place: bool = False) -> tuple[Tensor, KVState]:
        """One token: hidden (batch, d_model). The state grows, in_place or not."""
        y, state = self.prefill(hidden.unsqueeze(1), state)
        return y.squeeze(1), state

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> KVState:
        """The state before the first token: no keys. `dtype` is that of the activations."""
        empty = self.in_proj.weight.new_empty((batch_size, self.split_sizes[1] // self.head_dim, 0, self.head_dim))
        conv = None
        if self.conv_weight is not None:
            channels, width = self.conv_weight.shape
            conv = self.conv_weight.new_zeros((batch_size, width - 1, channels), dtype=dtype)
        return KVState(empty.to(dtype), empty.to(dtype), conv)

    def _heads(self, qkv: Tensor, first_position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, head, length, head_dim), the first two rotated."""
        parts = (v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for v in qkv.split(self.split_sizes, dim=-1))
        q, k, v = parts
        if self.rotary_dim:
            angles = _rotary_angles(first_position, qkv.shape[1], self.rotary_dim, qkv.device)
            q, k = _rotate(q, angles), _rotate(k, angles)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention under `mask`, or the causal one, and the output projection."""
        is_causal = mask is None and q.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def _same_document(seq_idx: Tensor, n_queries: int) -> Tensor:
    """Which positions (batch, 1, query, key) are of one document; any change of the number begins another.

    The queries are the last positions.
    """
    ordinals = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1), (1, 0))
    return (ordinals[:, -n_queries:].unsqueeze(2) == ordinals.unsqueeze(1)).unsqueeze(1)


def _with_new(documents: Tensor | None, past: int, seq_idx: Tensor | None, length: int) -> Tensor | None:
    """The documents of `past` cached positions and of `length` new ones; None where all are of one."""
    if documents is None and seq_idx is None:
        return None
    if seq_idx is None:
        assert documents is not None
        seq_idx = documents[:, -1:].expand(-1, length)
    if documents is None:  # what was read so far belongs to the first document of the new ones
        documents = seq_idx[:, :1].expand(-1, past)
    return torch.cat([documents, seq_idx], dim=1)


def _rotary_angles(first_position: int, length: int, rotary_dim: int, device: torch.device) -> Tensor:
    """Angles (length, rotary_dim / 2) of the rotary embedding (arXiv 2104.09864, section 3.2.2)."""
    positions = torch.arange(first_position, first_position + length, dtype=torch.float32, device=device)
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return positions[:, None] * ROTARY_BASE ** (-pairs / rotary_dim)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the leading dimensions of each head; fp32 inside, x's dtype outside."""
    half = angles.shape[-1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1).to(x.dtype)
