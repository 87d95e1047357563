"""One token through all that lies between the projections of a Mamba-1 mixer, for a batch that is decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import check_in_place, check_tensor
from kernels.dispatch import triton_unsupported
from kernels.mamba_step import launch, reference

__all__ = ["mamba_step_"]


def mamba_step_(
    conv_state: Tensor,
    scan_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """Convolution, SiLU, the projections to Δ, B and C, and the scan with its gate: one position, without gradients.

    Shapes: conv_state (batch, width-1, channel), scan_state (batch, channel, state), both overwritten by what follows
    them; x, z (batch, channel); conv_weight (channel, width); x_proj_weight (rank + 2 state, channel); dt_proj_weight
    (channel, rank), both in the dtype of x; A_log (channel, state); conv_bias, dt_bias, D (channel). Returns y
    (batch, channel) in the dtype of x. For a few sequences on a GPU these are two kernels: there every launch counts,
    and the weights are read once for each sequence. Raises ValueError naming the argument that does not fit.
    """
    tensors = (conv_state, scan_state, x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D)
    _check(*tensors)
    if x.is_cuda and launch.fits(x, A_log, conv_weight, dt_proj_weight) and triton_unsupported(x) is None:
        return torch.ops.mamba_train.mamba_step_.default(*tensors)
    return reference.step_(*tensors)


def _check(
    conv_state: Tensor,
    scan_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> None:
    name = "mamba_step_"
    check_tensor(name, "x", x, [("batch", None), ("channel", None)])
    batch, channels = x.shape
    check_tensor(name, "z", z, [("batch", batch), ("channel", channels)])
    check_tensor(name, "A_log", A_log, [("channel", channels), ("state", None)])
    check_tensor(name, "conv_weight", conv_weight, [("channel", channels), ("width", None)])
    check_tensor(name, "dt_proj_weight", dt_proj_weight, [("channel", channels), ("rank", None)])
    rank, states, width = dt_proj_weight.shape[1], A_log.shape[1], conv_weight.shape[1]
    outputs = rank + 2 * states
    check_tensor(name, "x_proj_weight", x_proj_weight, [("rank + 2 state", outputs), ("channel", channels)])
    check_tensor(name, "conv_state", conv_state, [("batch", batch), ("width-1", width - 1), ("channel", channels)])
    check_tensor(name, "scan_state", scan_state, [("batch", batch), ("channel", channels), ("state", states)])
    for label, vector in (("conv_bias", conv_bias), ("dt_bias", dt_bias), ("D", D)):
        check_tensor(name, label, vector, [("channel", channels)])
    others = (x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D)
    check_in_place(name, conv_state, *others)
    check_in_place(name, scan_state, *others)


_op = torch.library.custom_op("mamba_train::mamba_step_", reference.step_, mutates_args=("conv_state", "scan_state"))
_op.register_kernel("cuda")(launch.step_)


@_op.register_fake
def _(conv_state, scan_state, x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D):
    return x.new_empty(x.shape)
