"""A Mamba block: add, norm, mixer."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import add_rms_norm
from mamba_train.config import ModelConfig
from mamba_train.model.selective_ssm import SelectiveSSM, SSMState


class RMSNorm(nn.Module):
    """Root-mean-square norm with the residual addition before it (arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual) in x's dtype, x + residual in fp32)."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps)


class Mamba1Mixer(nn.Module):
    """Mixes along the length: in_proj to (x, z), the selective SSM, out_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.ssm = SelectiveSSM(config)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        return self.out_proj(self.ssm(x, z, seq_idx))

    def prefill(self, hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, state = self.ssm.prefill(x, z, state)
        return self.out_proj(y), state

    def step(self, hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, state = self.ssm.step(x, z, state)
        return self.out_proj(y), state


class Block(nn.Module):
    """One layer. `hidden` is the output of the layer before, `residual` the fp32 sum of those before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba1Mixer(config)

    def forward(self, hidden: Tensor, residual: Tensor | None, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, residual = self.norm(hidden, residual)
        return self.mixer(hidden, seq_idx), residual

    def prefill(self, hidden: Tensor, residual: Tensor | None, state: SSMState) -> tuple[Tensor, Tensor, SSMState]:
        hidden, residual = self.norm(hidden, residual)
        hidden, state = self.mixer.prefill(hidden, state)
        return hidden, residual, state

    def step(self, hidden: Tensor, residual: Tensor | None, state: SSMState) -> tuple[Tensor, Tensor, SSMState]:
        hidden, residual = self.norm(hidden, residual)
        hidden, state = self.mixer.step(hidden, state)
        return hidden, residual, state
