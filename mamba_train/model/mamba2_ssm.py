"""The sensitive middle of a Mamba-2 mixer: the twin of `SelectiveSSM`, and a unit for the same reasons.

It owns the convolution, `A_log`, `D`, `dt_bias` and the gated norm, and computes with them in its own
forward pass, so that an engine can wrap it with an fp32 policy and the small parameters reach the
operator as they are stored (contract C1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.rms_norm import gated_rms_norm
from kernels.ssd import ssd, ssd_step
from mamba_train.config import ModelConfig
from mamba_train.model.fused_mamba2 import FusedMamba2
from mamba_train.model.selective_ssm import SSMState


class Mamba2SSM(nn.Module):
    """Convolution of x, B and C, SSD over heads, gated norm (arXiv 2405.21060, section 7 and figure 6).

    Channels of the convolution are x (d_inner), then B and C (group × state each).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        n_heads = d_inner // config.head_dim
        self.head_shape = (n_heads, config.head_dim)
        self.group_shape = (config.n_groups, config.d_state)
        self.split_sizes = [d_inner, config.n_groups * config.d_state, config.n_groups * config.d_state]
        self.chunk_size, self.norm_eps = config.chunk_size, config.norm_eps
        self.recompute_scan = False  # less memory between forward and backward
        self.conv_weight = nn.Parameter(torch.empty(sum(self.split_sizes), config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.split_sizes)))
        self.dt_bias = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.norm_weight = nn.Parameter(torch.empty(d_inner))

    def forward(self, projected: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """projected: (batch, length, z, channels of the convolution and dt); seq_idx: (batch, length) int32.

        Returns (batch, length, d_inner) in the dtype of `projected`.
        """
        # No autocast: it would round what must stay fp32.
        with torch.autocast(projected.device.type, enabled=False):
            if torch.is_grad_enabled():
                weights = (self.conv_weight, self.conv_bias, self.A_log, self.D, self.dt_bias, self.norm_weight)
                sizes = (self.head_shape[1], self.group_shape[0], self.chunk_size, self.norm_eps)
                return FusedMamba2.apply(projected, *weights, seq_idx, *sizes, self.recompute_scan)
            z, xBC, dt = self.parts(projected)
            xBC = causal_conv1d(xBC, self.conv_weight, self.conv_bias, activation="silu", seq_idx=seq_idx)
            x, B, C = self._split(xBC)
            y = ssd(x, dt, self._A(), B, C, self.D, dt_bias=self.dt_bias, chunk_size=self.chunk_size, seq_idx=seq_idx)
            return self._norm(y, z)

    def parts(self, projected: Tensor) -> Sequence[Tensor]:
        """Views: z, what the convolution gets, dt."""
        d_inner, conv_channels = self.split_sizes[0], sum(self.split_sizes)
        return projected.split([d_inner, conv_channels, self.head_shape[0]], dim=-1)

    def prefill(
        self, xBC: Tensor, dt: Tensor, z: Tensor, state: SSMState, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """As forward, from `state` (of the first position's document); also returns the state after the last token."""
        with torch.autocast(xBC.device.type, enabled=False):
            xBC, conv = causal_conv1d(
                xBC,
                self.conv_weight,
                self.conv_bias,
                activation="silu",
                seq_idx=seq_idx,
                initial_state=state.conv,
                return_final_state=True,
            )
            x, B, C = self._split(xBC)
            y, scan = ssd(
                x,
                dt,
                self._A(),
                B,
                C,
                self.D,
                dt_bias=self.dt_bias,
                chunk_size=self.chunk_size,
                seq_idx=seq_idx,
                initial_state=state.scan,
                return_final_state=True,
            )
            return self._norm(y, z), SSMState(conv, scan)

    def step(
        self, xBC: Tensor, dt: Tensor, z: Tensor, state: SSMState, in_place: bool = False
    ) -> tuple[Tensor, SSMState]:
        """One token: the arguments of forward without the length. Equal to forward at that position.

        in_place: overwrite `state`.
        """
        with torch.autocast(xBC.device.type, enabled=False):
            xBC, conv = causal_conv1d_step(
                state.conv, xBC, self.conv_weight, self.conv_bias, activation="silu", in_place=in_place
            )
            x, B, C = self._split(xBC)
            y, scan = ssd_step(
                state.scan, x, dt, self.A_log, B, C, self.D, dt_bias=self.dt_bias, A_is_log=True, in_place=in_place
            )
            return self._norm(y, z), SSMState(conv, scan)

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> SSMState:
        """The state before the first token: zeros. `dtype` is that of the activations."""
        channels, d_conv = self.conv_weight.shape
        device = self.A_log.device
        scan_shape = (batch_size, *self.head_shape, self.group_shape[1])
        return SSMState(
            conv=torch.zeros(batch_size, d_conv - 1, channels, dtype=dtype, device=device),
            scan=torch.zeros(scan_shape, dtype=torch.float32, device=device),
        )

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., head, head_dim), B and C (..., group, state), as views."""
        x, B, C = xBC.split(self.split_sizes, dim=-1)
        return x.unflatten(-1, self.head_shape), B.unflatten(-1, self.group_shape), C.unflatten(-1, self.group_shape)

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return gated_rms_norm(y, z, self.norm_weight, eps=self.norm_eps, group_size=y.shape[-1] // self.group_shape[0])

    def _A(self) -> Tensor:
        # Not `.float()`: that would hide from the audit that A_log arrived rounded.
        return -torch.exp(self.A_log)
