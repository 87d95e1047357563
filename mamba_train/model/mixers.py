"""What mixes along the length in a layer: the projections of Mamba-1 and Mamba-2 around their SSM."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from mamba_train.config import MixerKind, ModelConfig
from mamba_train.model.attention import AttentionMixer, KVState
from mamba_train.model.fused_ssm import forgetting
from mamba_train.model.mamba2_ssm import Mamba2SSM
from mamba_train.model.projection import Projection
from mamba_train.model.selective_ssm import SelectiveSSM, SSMState

LayerState: TypeAlias = SSMState | KVState
"""What one layer remembers between tokens."""


class Mixer(Protocol):
    """What a layer asks of its mixer; hidden is (batch, length, d_model), in `step` (batch, d_model).

    The state is the mixer's own kind of LayerState. prefill and step return the new state with the output; in a step
    with in_place=True a state of constant size is overwritten, and the one returned is the same.
    """

    def __call__(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor: ...
    def prefill(self, hidden: Tensor, state: Any, seq_idx: Tensor | None = None) -> tuple[Tensor, Any]: ...
    def step(self, hidden: Tensor, state: Any, in_place: bool = False) -> tuple[Tensor, Any]: ...
    def initial_state(self, batch_size: int, dtype: torch.dtype) -> Any: ...


class Mamba1Mixer(nn.Module):
    """in_proj to (x, z), the selective SSM, out_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        self.in_proj = Projection(config.d_model, 2 * d_inner)
        self.ssm = SelectiveSSM(config)
        self.out_proj = Projection(d_inner, config.d_model)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        y = self.ssm(self.in_proj(hidden), seq_idx)
        with forgetting(y):
            return self.out_proj(y)

    def prefill(self, hidden: Tensor, state: SSMState, seq_idx: Tensor | None = None) -> tuple[Tensor, SSMState]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, state = self.ssm.prefill(x, z, state, seq_idx)
        return self.out_proj(y), state

    def step(self, hidden: Tensor, state: SSMState, in_place: bool = False) -> tuple[Tensor, SSMState]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, state = self.ssm.step(x, z, state, in_place)
        return self.out_proj(y), state

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> SSMState:
        return self.ssm.initial_state(batch_size, dtype)


class Mamba2Mixer(nn.Module):
    """in_proj to (z, x, B, C, Δ) at once, the SSM with its convolution and gated norm, out_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        self.ssm = Mamba2SSM(config)
        width = d_inner + sum(self.ssm.split_sizes) + self.ssm.head_shape[0]
        self.in_proj = Projection(config.d_model, width)
        self.out_proj = Projection(d_inner, config.d_model)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self.out_proj(self.ssm(self.in_proj(hidden), seq_idx))

    def prefill(self, hidden: Tensor, state: SSMState, seq_idx: Tensor | None = None) -> tuple[Tensor, SSMState]:
        z, xBC, dt = self.ssm.parts(self.in_proj(hidden))
        y, state = self.ssm.prefill(xBC, dt, z, state, seq_idx)
        return self.out_proj(y), state

    def step(self, hidden: Tensor, state: SSMState, in_place: bool = False) -> tuple[Tensor, SSMState]:
        z, xBC, dt = self.ssm.parts(self.in_proj(hidden))
        y, state = self.ssm.step(xBC, dt, z, state, in_place)
        return self.out_proj(y), state

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> SSMState:
        return self.ssm.initial_state(batch_size, dtype)


MIXERS: dict[MixerKind, Callable[[ModelConfig], Mixer]] = {
    MixerKind.mamba1: Mamba1Mixer,
    MixerKind.mamba2: Mamba2Mixer,
    MixerKind.attention: AttentionMixer,
}
