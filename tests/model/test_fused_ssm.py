"""The fused form of the Mamba-1 mixer against the plain operators, and what it leaves for the backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from kernels.selective_scan import selective_scan
from mamba_train.config import ModelConfig
from mamba_train.model.mixers import Mamba1Mixer

D_MODEL, D_INNER, D_STATE, DT_RANK = 12, 24, 5, 3


def make_mixer(dtype: torch.dtype = torch.float64) -> Mamba1Mixer:
    torch.manual_seed(0)
    mixer = Mamba1Mixer(ModelConfig(d_model=D_MODEL, n_layer=1, d_state=D_STATE, dt_rank=DT_RANK))
    for parameter in mixer.parameters():
        parameter.data = torch.randn_like(parameter, dtype=dtype) / 2
    return mixer


def plain(
    mixer: Mamba1Mixer,
    hidden: Tensor,
    seq_idx: Tensor | None,
    sizes: tuple[int, int, int] = (DT_RANK, D_STATE, D_STATE),
) -> Tensor:
    ssm = mixer.ssm
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    x = causal_conv1d(x, ssm.conv_weight, ssm.conv_bias, activation="silu", seq_idx=seq_idx)
    dt, B, C = F.linear(x, ssm.x_proj_weight).split(sizes, dim=-1)
    dt = F.linear(dt, ssm.dt_proj_weight)
    return mixer.out_proj(selective_scan(x, dt, -torch.exp(ssm.A_log), B, C, ssm.D, z, ssm.dt_bias, seq_idx=seq_idx))


def gradients(mixer: Mamba1Mixer, hidden: Tensor, y: Tensor) -> dict[str, Tensor]:
    weights = dict(mixer.named_parameters())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, [hidden, *weights.values()], direction)
    return dict(zip(["hidden", *weights], grads, strict=True))


def fused_node(y: Tensor) -> Any:
    """The node of FusedSSM in the graph of a mixer's output."""
    left = [y.grad_fn]
    while left:
        node = left.pop()
        if type(node).__name__ == "FusedSSMBackward":
            return node
        left += [] if node is None else [following for following, _ in node.next_functions]
    raise AssertionError("the mixer took its plain form")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_plain_operators(packed: bool, recompute: bool) -> None:
    mixer = make_mixer()
    mixer.ssm.recompute_scan = recompute
    hidden = torch.randn(2, 19, D_MODEL, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0] * 4 + [1] * 15, [3] * 19], dtype=torch.int32) if packed else None
    ours, expected = mixer(hidden, seq_idx), plain(mixer, hidden, seq_idx)
    torch.testing.assert_close(ours, expected)
    actual = gradients(mixer, hidden, ours)
    for name, grad in gradients(mixer, hidden, expected).items():
        torch.testing.assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")
        assert grad.abs().max() > 1e-3, "the comparison would see no error"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_kept_graph_is_walked_twice(recompute: bool) -> None:
    mixer = make_mixer()
    mixer.ssm.recompute_scan = recompute
    hidden = torch.randn(1, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    y = mixer(hidden)
    total, weights = y.sum(), list(mixer.parameters())
    first, second = (torch.autograd.grad(total, weights, retain_graph=again) for again in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_that_are_gone_until_the_backward_of_the_module() -> None:
    """Under FSDP2 and ZeRO-3 the backward of out_proj comes before the module's weights are gathered again."""
    mixer = make_mixer(torch.float32)
    mixer.ssm.recompute_scan = True
    hidden = torch.randn(1, 7, D_MODEL, requires_grad=True)
    expected = gradients(mixer, hidden, mixer(hidden))
    stored = {p: p.untyped_storage() for p in mixer.ssm.parameters()}
    values = {p: p.detach().clone() for p in stored}
    y = mixer(hidden)
    for storage in stored.values():
        storage.resize_(0)

    def gather(_: tuple[Tensor, ...]) -> None:
        for parameter, storage in stored.items():
            storage.resize_(parameter.numel() * parameter.element_size())
            with torch.autograd._unsafe_preserve_version_counter(parameter):
                parameter.data.copy_(values[parameter])

    fused_node(y).register_prehook(gather)
    actual = gradients(mixer, hidden, y)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize(("recompute", "channels"), [(False, 6), (True, 3)])
def test_bytes_that_are_saved(recompute: bool, channels: int) -> None:
    """Per token: channels · d_inner values, the small projection, and without recomputation the scan's states."""
    mixer = make_mixer(torch.float32)
    mixer.ssm.recompute_scan = recompute
    length = 2000
    hidden = torch.randn(1, length, D_MODEL, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(hidden)
    weights = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    activations = sum(size for address, size in saved.items() if address not in weights)
    states = 0
    if not recompute:
        states = fused_node(y).saved_tensors[-2].nbytes
    per_token = (activations - states) / length / 4
    expected = D_MODEL + channels * D_INNER + DT_RANK + 2 * D_STATE
    assert expected <= per_token < expected + 1
