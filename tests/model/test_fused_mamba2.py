"""The fused form of the Mamba-2 mixer against the plain operators."""

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.rms_norm import gated_rms_norm
from kernels.ssd import ssd
from mamba_train.config import ModelConfig
from mamba_train.model.mixers import Mamba2Mixer


def make_mixer(groups: int) -> Mamba2Mixer:
    torch.manual_seed(0)
    config = ModelConfig(d_model=12, n_layer=1, d_state=5, head_dim=4, n_groups=groups, chunk_size=8)
    mixer = Mamba2Mixer(config)
    for parameter in mixer.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 2
    return mixer


def plain(mixer: Mamba2Mixer, hidden: Tensor, seq_idx: Tensor | None) -> Tensor:
    ssm = mixer.ssm
    z, xBC, dt = mixer.in_proj(hidden).split([24, sum(ssm.split_sizes), 6], dim=-1)
    xBC = causal_conv1d(xBC, ssm.conv_weight, ssm.conv_bias, activation="silu", seq_idx=seq_idx)
    x, B, C = xBC.split(ssm.split_sizes, dim=-1)
    B, C = (v.unflatten(2, ssm.group_shape) for v in (B, C))
    y = ssd(
        x.unflatten(2, ssm.head_shape), dt, -torch.exp(ssm.A_log), B, C, ssm.D, dt_bias=ssm.dt_bias, seq_idx=seq_idx
    )
    size = 24 // ssm.group_shape[0]
    return mixer.out_proj(gated_rms_norm(y.flatten(2), z, ssm.norm_weight, eps=ssm.norm_eps, group_size=size))


def gradients(mixer: Mamba2Mixer, hidden: Tensor, y: Tensor, keep: bool = False) -> dict[str, Tensor]:
    weights = dict(mixer.named_parameters())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, [hidden, *weights.values()], direction, retain_graph=keep)
    return dict(zip(["hidden", *weights], grads, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_plain_operators(packed: bool, groups: int, recompute: bool) -> None:
    mixer = make_mixer(groups)
    mixer.ssm.recompute_scan = recompute
    hidden = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0] * 4 + [1] * 15, [3] * 19], dtype=torch.int32) if packed else None
    ours, expected = mixer(hidden, seq_idx), plain(mixer, hidden, seq_idx)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(mixer(hidden, seq_idx), expected)
    actual = gradients(mixer, hidden, ours)
    for name, grad in gradients(mixer, hidden, expected).items():
        torch.testing.assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")
        assert grad.abs().max() > 1e-3, "the comparison would see no error"


def test_computing_again_keeps_less() -> None:
    mixer, sizes = make_mixer(1), []
    hidden = torch.randn(1, 64, 12, dtype=torch.float64, requires_grad=True)
    for recompute in (False, True):
        mixer.ssm.recompute_scan = recompute
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mixer(hidden)
        sizes.append(sum(kept))
    states = 64 // 8 * 6 * 4 * 5  # chunks x heads x head_dim x states
    assert sizes[0] - sizes[1] == states


def test_a_kept_graph_is_walked_twice() -> None:
    mixer = make_mixer(1)
    hidden = torch.randn(1, 7, 12, dtype=torch.float64, requires_grad=True)
    y = mixer(hidden)
    first, second = gradients(mixer, hidden, y, keep=True), gradients(mixer, hidden, y)
    assert all(torch.equal(first[name], second[name]) for name in first)
