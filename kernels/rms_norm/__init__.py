"""Root-mean-square normalisation: alone, fused with the residual add, and gated over groups of channels."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import check_floating, check_same_device, check_tensor, once_for_each_kind
from kernels.rms_norm import dispatch  # noqa: F401  registers torch.ops.mamba_train.*rms_norm
from kernels.rms_norm.gated import gated_rms_norm_op
from kernels.rms_norm.reference import add_rms_norm_op, rms_norm_op

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x², last axis) + eps) · weight.

    Shapes: x (..., channel), weight (channel). Arithmetic is fp32, or fp64 when x is fp64; the result has the dtype
    of x. Raises ValueError naming the argument that does not fit. Source: arXiv 1910.07467, equation 4.
    """
    _check_norm(x, weight)
    return rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual): the add and the norm that open a block.

    Shapes: x, residual (..., channel); weight (channel). The sum is fp32 (fp64 when x is fp64), whatever the dtype
    of x; the normalised result has the dtype of x. `residual=None` stands for zeros, as before the first block.
    Raises ValueError naming the argument that does not fit.
    """
    _check_add(x, residual, weight)
    y, total, _ = add_rms_norm_op(x, residual, weight, eps)
    return y, total


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Return rms_norm(x · silu(z)) · weight, or rms_norm(x) · weight · silu(z) with `norm_before_gate=True`.

    The mean square is taken over each `group_size` consecutive channels (None: over all of them).
    Shapes: x, z (..., channel); weight (channel). Arithmetic is fp32, or fp64 when x is fp64; the result has the
    dtype of x. Raises ValueError naming the argument that does not fit. Source: arXiv 2405.21060, section 7.
    """
    _check_gated(x, z, weight)
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size
    if group_size < 1 or channels % group_size:
        raise ValueError(
            f"gated_rms_norm: group_size is {group_size}, expected a divisor of the {channels} channels of x"
        )
    return gated_rms_norm_op(x, z, weight, eps, group_size, norm_before_gate)[0]


@once_for_each_kind
def _check_norm(x: Tensor, weight: Tensor) -> None:
    _check("rms_norm", x, None, weight)


@once_for_each_kind
def _check_add(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    _check("add_rms_norm", x, residual, weight)


@once_for_each_kind
def _check_gated(x: Tensor, z: Tensor, weight: Tensor) -> None:
    name = "gated_rms_norm"
    _check(name, x, None, weight)
    if z.shape != x.shape:
        raise ValueError(f"{name}: z has shape {tuple(z.shape)}, expected that of x, {tuple(x.shape)}")
    check_floating(name, z=z)
    check_same_device(name, "x", x=x, z=z)


def _check(name: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (..., channel) with at least one channel")
    check_tensor(name, "weight", weight, [("channel", x.shape[-1])])
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual has shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}")
    check_floating(name, x=x, residual=residual, weight=weight)
    check_same_device(name, "x", x=x, residual=residual, weight=weight)
