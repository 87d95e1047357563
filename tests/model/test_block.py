"""The parts of a layer against their definitions."""

import torch
from torch.nn import functional as F

from mamba_train.config import MixerKind
from mamba_train.model.block import Block, GatedMLP
from tests.model.families import small_config


def test_the_second_half_of_the_mlps_projection_is_the_gate() -> None:
    """As in the published layout, whose first projection is used here as it is."""
    mlp = GatedMLP(small_config("transformer"))
    hidden = torch.randn(2, 5, 40)
    value, gate = mlp.in_proj.weight[:56], mlp.in_proj.weight[56:]
    expected = ((hidden @ value.T) * F.silu(hidden @ gate.T)) @ mlp.out_proj.weight.T
    torch.testing.assert_close(mlp(hidden), expected)


@torch.no_grad()
def test_a_layer_adds_its_mixer_and_its_mlp_to_the_residual() -> None:
    block = Block(small_config("transformer"), MixerKind.attention)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 4)
    hidden, residual = torch.randn(2, 5, 40), torch.randn(2, 5, 40)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    before_mixer = hidden + residual
    before_mlp = before_mixer + block.mixer(norm(before_mixer, block.norm.weight))
    expected = before_mlp + block.mlp(norm(before_mlp, block.mlp_norm.weight))
    out, total = block(hidden, residual)
    torch.testing.assert_close(total, before_mlp)
    torch.testing.assert_close(out + total, expected)
