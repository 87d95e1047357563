"""Checks that are made once for each kind of call."""

import pytest
import torch
from torch import Tensor

from kernels.checks import once_for_each_kind

SEEN: list[Tensor] = []


@once_for_each_kind
def check(x: Tensor, y: Tensor | None) -> None:
    SEEN.append(x)
    if x.shape[0] == 3:
        raise ValueError("three")


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(4), None),
        (torch.zeros(2, dtype=torch.float64), None),
        (torch.zeros(2, device="meta"), None),
        (torch.zeros(2), torch.zeros(2)),
        (torch.zeros(1, 2)[0].as_subclass(type("Special", (Tensor,), {})), None),
    ],
    ids=str,
)
def test_another_kind_is_checked(other: tuple[Tensor, Tensor | None]) -> None:
    for _ in range(2):
        check(torch.zeros(2), None)
    SEEN.clear()
    check(torch.ones(2), None)
    assert not SEEN
    check(*other)
    assert len(SEEN) == 1


def test_what_is_wrong_is_wrong_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="three"):
            check(torch.zeros(3), None)
