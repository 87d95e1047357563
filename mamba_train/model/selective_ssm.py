"""The sensitive middle of a Mamba-1 mixer: everything between `in_proj` and `out_proj`.

It is one module, and it computes with its parameters itself, so that an engine can wrap it as a
unit with an fp32 policy: the small parameters that the recurrence depends on (`A_log`, `D`,
`dt_bias`) then reach the scan as they are stored, while the matrices are cast here to the dtype of
the activations. Moving a parameter out of this module would break that (contract C1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.selective_scan import selective_scan, selective_scan_step
from mamba_train.config import ModelConfig
from mamba_train.model.fused_ssm import Derived, FusedSSM


@dataclass
class SSMState:
    """What a mixer remembers between tokens.

    conv: (batch, d_conv - 1, d_inner), the last inputs of the convolution.
    scan: (batch, d_inner, d_state), fp32; narrower only where a decoder keeps it so.
    """

    conv: Tensor
    scan: Tensor


class SelectiveSSM(nn.Module):
    """Convolution, input-dependent Δ, B, C, and the selective scan (arXiv 2312.00752, algorithm 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner = config.expand * config.d_model
        assert config.dt_rank is not None, "resolve the model config first"
        self.time_invariant = config.time_invariant
        self.recompute_scan = False  # less memory between forward and backward
        self.derived: Derived | None = None  # kept up to date by an engine, which has to compute it once in a step
        self.split_sizes = [config.dt_rank, config.d_state, config.d_state]
        self.conv_weight = nn.Parameter(torch.empty(d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_inner))
        self.x_proj_weight = nn.Parameter(torch.empty(sum(self.split_sizes), d_inner))
        self.dt_proj_weight = nn.Parameter(torch.empty(d_inner, config.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(d_inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(d_inner, config.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(d_inner, dtype=torch.float32))

    def forward(self, xz: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """xz: (batch, length, 2 · d_inner), x and z side by side; seq_idx: (batch, length) int32.

        Returns (batch, length, d_inner) in xz's dtype.
        """
        # No autocast: it would round what must stay fp32.
        with torch.autocast(xz.device.type, enabled=False):
            if torch.is_grad_enabled() and not self.time_invariant:
                weights = (self.conv_weight, self.conv_bias, self.x_proj_weight, self.dt_proj_weight, self.A_log)
                derived = self.derived if self.derived and self.derived.x_proj.dtype == xz.dtype else None
                return FusedSSM.apply(xz, *weights, self.D, self.dt_bias, seq_idx, self.recompute_scan, derived)
            x, z = xz.chunk(2, dim=-1)
            x = causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu", seq_idx=seq_idx)
            dt, B, C = self._project(x)
            return selective_scan(x, dt, self._A(), B, C, self.D, z, self.dt_bias, seq_idx=seq_idx)

    def prefill(self, x: Tensor, z: Tensor, state: SSMState, seq_idx: Tensor | None = None) -> tuple[Tensor, SSMState]:
        """As forward, from `state` (of the first position's document); also returns the state after the last token."""
        with torch.autocast(x.device.type, enabled=False):
            x, conv = causal_conv1d(
                x,
                self.conv_weight,
                self.conv_bias,
                activation="silu",
                seq_idx=seq_idx,
                initial_state=state.conv,
                return_final_state=True,
            )
            dt, B, C = self._project(x)
            y, scan = selective_scan(
                x,
                dt,
                self._A(),
                B,
                C,
                self.D,
                z,
                self.dt_bias,
                seq_idx=seq_idx,
                initial_state=state.scan,
                return_final_state=True,
            )
        return y, SSMState(conv, scan)

    def step(self, x: Tensor, z: Tensor, state: SSMState, in_place: bool = False) -> tuple[Tensor, SSMState]:
        """One token: x, z (batch, d_inner). Equal to forward at that position. in_place: overwrite `state`."""
        with torch.autocast(x.device.type, enabled=False):
            x, conv = causal_conv1d_step(
                state.conv, x, self.conv_weight, self.conv_bias, activation="silu", in_place=in_place
            )
            dt, B, C = self._project(x)
            y, scan = selective_scan_step(
                state.scan, x, dt, self.A_log, B, C, self.D, z, self.dt_bias, A_is_log=True, in_place=in_place
            )
        return y, SSMState(conv, scan)

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> SSMState:
        """The state before the first token: zeros. `dtype` is that of the activations."""
        d_inner, d_conv = self.conv_weight.shape
        device = self.A_log.device
        return SSMState(
            conv=torch.zeros(batch_size, d_conv - 1, d_inner, dtype=dtype, device=device),
            scan=torch.zeros(batch_size, *self.A_log.shape, dtype=torch.float32, device=device),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Δ before bias and softplus (..., d_inner), B and C (..., d_state); views where possible."""
        if self.time_invariant:
            # The same for every token, learned by the same weights: all that is missing is the selection.
            x = torch.ones_like(x)
        dt, B, C = F.linear(x, self.x_proj_weight.to(x.dtype)).split(self.split_sizes, dim=-1)
        return F.linear(dt, self.dt_proj_weight.to(x.dtype)), B, C

    def _A(self) -> Tensor:
        # Not `.float()`: that would hide from the audit that A_log arrived rounded.
        return -torch.exp(self.A_log)
