"""Checks that the SSD operator and its step share."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import check_tensor


def check_groups(function: str, B: Tensor, heads: int, axis: int) -> None:
    """Raise ValueError unless the heads divide evenly among the groups of B."""
    groups = B.shape[axis]
    if groups < 1 or heads % groups:
        raise ValueError(
            f"{function}: B has shape {tuple(B.shape)}, expected a number of groups that divides the {heads} heads of x"
        )


def check_skip(function: str, D: Tensor | None, heads: int, head_dim: int) -> None:
    """Raise ValueError unless D is (head) or (head, head_dim)."""
    if D is not None and D.dim() == 2:
        check_tensor(function, "D", D, [("head", heads), ("head_dim", head_dim)])
    elif D is not None:
        check_tensor(function, "D", D, [("head", heads)])
