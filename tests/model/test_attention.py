"""Attention against its definition in fp64, its documents and its cache."""

import math

import pytest
import torch
from torch import Tensor

from mamba_train.model.attention import AttentionMixer
from tests.kernels.loops import LENGTHS, documents, random_documents
from tests.model.families import small_config


def make_mixer(**changes: int) -> AttentionMixer:
    mixer = AttentionMixer(small_config("transformer", **changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return mixer


def rotated(vector: Tensor, position: int, rotary_dim: int) -> Tensor:
    """Each pair (i, i + half) of the leading dimensions turned by position · 10000^(-2i / rotary_dim)."""
    out, half = vector.clone(), rotary_dim // 2
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / rotary_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = vector[i] * cos - vector[i + half] * sin
        out[i + half] = vector[i] * sin + vector[i + half] * cos
    return out


def naive(mixer: AttentionMixer, hidden: Tensor, seq_idx: Tensor | None, rotary_dim: int) -> Tensor:
    """One query, one head, one key at a time."""
    batch, length, _ = hidden.shape
    heads, kv_heads, head_dim = 6, 2, 12
    ordinals = documents(seq_idx, batch, length)
    rows = []
    for b in range(batch):
        qkv = hidden[b] @ mixer.in_proj.weight.T
        if mixer.conv_weight is not None:
            width, raw = mixer.conv_weight.shape[1], qkv
            qkv = mixer.conv_bias.expand(length, -1).clone()
            for t in range(length):
                for lag in range(min(width, t + 1)):
                    if ordinals[b][t] == ordinals[b][t - lag]:
                        qkv[t] += mixer.conv_weight[:, width - 1 - lag] * raw[t - lag]
        q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        q, k, v = (part.reshape(length, -1, head_dim) for part in (q, k, v))
        for t in range(length):
            seen = [s for s in range(t + 1) if ordinals[b][s] == ordinals[b][t]]
            out = []
            for head in range(heads):
                kv_head = head * kv_heads // heads
                query = rotated(q[t, head], t, rotary_dim)
                scores = [query @ rotated(k[s, kv_head], s, rotary_dim) / math.sqrt(head_dim) for s in seen]
                weights = torch.softmax(torch.stack(scores), dim=0)
                out.append(sum(w * v[s, kv_head] for w, s in zip(weights, seen, strict=True)))
            rows.append(torch.cat(out) @ mixer.out_proj.weight.T)
    return torch.stack(rows).view(batch, length, -1)


def draw(length: int) -> Tensor:
    return torch.randn(2, length, 40, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rotary_dim", "attention_d_conv"), [(12, 0), (8, 0), (0, 0), (8, 3)])
@torch.no_grad()
def test_equals_the_definition(length: int, packed: bool, rotary_dim: int, attention_d_conv: int) -> None:
    mixer = make_mixer(rotary_dim=rotary_dim, attention_d_conv=attention_d_conv)
    seq_idx = random_documents(2, length, torch.Generator().manual_seed(5)) if packed else None
    hidden = draw(length)
    # Angles are fp32.
    torch.testing.assert_close(mixer(hidden, seq_idx), naive(mixer, hidden, seq_idx, rotary_dim), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention_d_conv", [0, 3])
@torch.no_grad()
def test_steps_and_prefills_equal_forward(length: int, attention_d_conv: int) -> None:
    mixer = make_mixer(attention_d_conv=attention_d_conv)
    hidden = draw(length)
    expected = mixer(hidden)
    state, rows = mixer.initial_state(2, torch.float64), []
    for t in range(length):
        row, state = mixer.step(hidden[:, t], state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, rtol=1e-5, atol=1e-5)

    state, parts = mixer.initial_state(2, torch.float64), []
    for part in hidden.split(7, dim=1):
        y, state = mixer.prefill(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
    assert state.keys.shape == (2, 2, length, 12)


def test_the_future_and_other_documents_have_no_gradient() -> None:
    mixer = make_mixer(attention_d_conv=3)
    hidden = draw(20).requires_grad_()
    seq_idx = torch.tensor([[0] * 8 + [1] * 12] * 2)
    [grad] = torch.autograd.grad(mixer(hidden, seq_idx)[:, 11].sum(), hidden)
    seen = grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == [8 <= t <= 11 for t in range(20)]
