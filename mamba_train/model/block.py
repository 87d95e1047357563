"""A layer: add, norm, mixer, and in some models add, norm, MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.rms_norm import add_rms_norm
from mamba_train.config import MixerKind, ModelConfig
from mamba_train.model.mixers import MIXERS, LayerState, Mixer


class RMSNorm(nn.Module):
    """Root-mean-square norm with the residual addition before it (arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual) in x's dtype, x + residual in fp32)."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps)


class GatedMLP(nn.Module):
    """out_proj(value · silu(gate)), one projection for both (arXiv 2002.05202, SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_intermediate, bias=False)
        self.out_proj = nn.Linear(config.d_intermediate, config.d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        value, gate = self.in_proj(hidden).chunk(2, dim=-1)
        return self.out_proj(value * F.silu(gate))


class Block(nn.Module):
    """One layer. `hidden` is the output of the part before, `residual` the fp32 sum of those before it."""

    mixer: Mixer

    def __init__(self, config: ModelConfig, mixer: MixerKind) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[mixer](config)
        if config.d_intermediate:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = GatedMLP(config)
        self.has_mlp = config.d_intermediate > 0

    def forward(self, hidden: Tensor, residual: Tensor | None, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, residual = self.norm(hidden, residual)
        return self._mlp(self.mixer(hidden, seq_idx), residual)

    def prefill(
        self, hidden: Tensor, residual: Tensor | None, state: LayerState, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LayerState]:
        hidden, residual = self.norm(hidden, residual)
        hidden, state = self.mixer.prefill(hidden, state, seq_idx)
        return *self._mlp(hidden, residual), state

    def step(
        self, hidden: Tensor, residual: Tensor | None, state: LayerState, in_place: bool = False
    ) -> tuple[Tensor, Tensor, LayerState]:
        hidden, residual = self.norm(hidden, residual)
        hidden, state = self.mixer.step(hidden, state, in_place)
        return *self._mlp(hidden, residual), state

    def _mlp(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if not self.has_mlp:
            return hidden, residual
        hidden, residual = self.mlp_norm(hidden, residual)
        return self.mlp(hidden), residual
