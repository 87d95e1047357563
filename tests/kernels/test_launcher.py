"""Which launches share a compiled kernel, and which must not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import launcher


class Kernel:
    """Stands in for a Triton kernel of two tensors, one number and one constant; counts what it compiles."""

    __name__ = "kernel"

    def __init__(self, specialises: bool = False) -> None:
        self.params = [SimpleNamespace(name=n, do_not_specialize=n == "number" and not specialises) for n in NAMES]
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, num_warps: int) -> Any:
            assert len(grid) == 2
            self.compiled.append((grid, arguments, num_warps))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


NAMES = ("first", "second", "number", "constant")


def test_equal_launches_share_a_kernel() -> None:
    kernel, x = Kernel(), torch.zeros(16)
    for number, grid in ((1, (3, 1)), (16, (4, 2)), (2**31 - 1, (5, 1))):
        launcher.launch(kernel, grid, (x, None), (number,), (64,), 4)
    assert kernel.compiled == [((3, 1), (x, None, 1, 64), 4)]
    assert kernel.launched == [((4, 2, 1), (x, None, 16, 64)), ((5, 1, 1), (x, None, 2**31 - 1, 64))]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (torch.zeros(16, dtype=torch.bfloat16), None)},
        {"tensors": (torch.zeros(17)[1:], None)},
        {"tensors": (torch.zeros(16), torch.zeros(1))},
        {"numbers": (2**31,)},
        {"constants": (32,)},
        {"warps": 8},
    ],
    ids=str,
)
def test_what_another_kernel_is_compiled_for(other: dict[str, Any]) -> None:
    usual = {"tensors": (torch.zeros(16), None), "numbers": (1,), "constants": (64,), "warps": 4}
    kernel = Kernel()
    for _ in range(2):
        for arguments in (usual, usual | other):
            launcher.launch(kernel, (1, 1), **arguments)
    assert len(kernel.compiled) == 2
    assert len(kernel.launched) == 2


def test_a_kernel_that_specialises_on_numbers_is_refused() -> None:
    with pytest.raises(AssertionError, match="kernel specialises on number"):
        launcher.launch(Kernel(specialises=True), (1, 1), (torch.zeros(1), None), (1,), (64,), 4)
