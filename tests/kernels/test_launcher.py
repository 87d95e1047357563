"""Which launches share a compiled kernel, and which must not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import launcher
from kernels.launcher import Launch, pieces

NAMES = ("first", "second", "number", "constant")
STREAM = 77


class Kernel:
    """Stands in for a Triton kernel of two tensors, one number and one constant; counts what it compiles."""

    __name__ = "kernel"

    def __init__(self, specialises: bool = False) -> None:
        self.params = [SimpleNamespace(name=n, do_not_specialize=n == "number" and not specialises) for n in NAMES]
        self.compiled: list[tuple[Any, ...]] = []
        self.early: list[bool] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, num_warps: int, launch_pdl: bool = False) -> Any:
            assert len(grid) == 2
            self.compiled.append((grid, arguments, num_warps))
            self.early.append(launch_pdl)
            return Compiled(self)

        return run


class Compiled:
    """With the attributes of Triton's."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.run(*grid, STREAM, "function", "metadata", None, None, None, *arguments)

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *arguments: Any) -> None:
        assert (stream, function, metadata) == (STREAM, "function", "metadata")
        assert arguments[:3] == (None, None, None)  # hooks and what they get
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[3:]]
        self.kernel.launched.append(((x, y, z), *addresses))


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)


def test_a_launch_again() -> None:
    kernel, x = Kernel(), torch.zeros(16)
    again = Launch(kernel, (3, 1), (1,), (64,), 4)
    for tensor in (x, x, torch.ones(16)):
        again(tensor, None)
    assert kernel.compiled == [((3, 1), (x, None, 1, 64), 4)]
    assert [launched[0] for launched in kernel.launched] == [(3, 1, 1)] * 2
    assert kernel.launched[0][1:] == (x.data_ptr(), None, 1, 64)


def test_equal_launches_share_a_kernel() -> None:
    kernel, x = Kernel(), torch.zeros(16)
    for number, grid in ((1, (3, 1)), (16, (4, 2)), (2**31 - 1, (5, 1))):
        Launch(kernel, grid, (number,), (64,), 4)(x, None)
    assert kernel.compiled == [((3, 1), (x, None, 1, 64), 4)]
    address = x.data_ptr()
    assert kernel.launched == [((4, 2, 1), address, None, 16, 64), ((5, 1, 1), address, None, 2**31 - 1, 64)]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (torch.zeros(16, dtype=torch.bfloat16), None)},
        {"tensors": (torch.zeros(17)[1:], None)},
        {"tensors": (torch.zeros(16), torch.zeros(1))},
        {"numbers": (2**31,)},
        {"constants": (32,)},
        {"warps": 8},
        {"early": True},
    ],
    ids=str,
)
def test_what_another_kernel_is_compiled_for(other: dict[str, Any]) -> None:
    usual = {"tensors": (torch.zeros(16), None), "numbers": (1,), "constants": (64,), "warps": 4, "early": False}
    kernel = Kernel()
    launches = {}
    for _ in range(3):
        for arguments in (usual, usual | other):
            made = tuple(arguments[name] for name in ("numbers", "constants", "warps", "early"))
            launch = launches.setdefault(made, Launch(kernel, (1, 1), *made))
            launch(*arguments["tensors"])
    assert len(kernel.compiled) == 2
    assert len(kernel.launched) == 4
    assert kernel.early == [False, "early" in other]


def test_what_is_interpreted_is_launched_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, num_warps: self.compiled.append(a))
    launch = Launch(kernel, (1, 1), (1,), (64,), 4)
    for _ in range(2):
        launch(torch.zeros(16), None)
    assert len(kernel.compiled) == 2


def test_a_kernel_that_specialises_on_a_number_is_compiled_for_each() -> None:
    kernel, x = Kernel(specialises=True), torch.zeros(16)
    for number in (1, 2, 2, 1):
        Launch(kernel, (1, 1), (number,), (64,), 4)(x, None)
    assert [arguments for _, arguments, _ in kernel.compiled] == [(x, None, 1, 64), (x, None, 2, 64)]
    assert [launched[3] for launched in kernel.launched] == [2, 1]


def test_launches_are_remembered_by_what_they_depend_on() -> None:
    made = launcher.remembered(lambda *sizes: Launch(Kernel(), (1, 1), sizes, (64,), 4))
    assert made(1, 2) is made(1, 2)
    assert made(1, 2) is not made(1, 3)


def test_pieces_are_launched_with_as_their_views_would_be() -> None:
    kernel, whole = Kernel(), torch.arange(12.0)
    first, second = pieces(whole, (4, 8), (torch.float32, torch.bfloat16))
    launch = Launch(kernel, (1, 1), (1,), (64,), 4)
    for _ in range(2):
        launch(whole, second)
    [(_, (_, view, *_), _)] = kernel.compiled
    assert (view.data_ptr(), view.dtype, view.shape) == (whole[4:].data_ptr(), torch.bfloat16, (16,))
    assert kernel.launched == [((1, 1, 1), whole.data_ptr(), view.data_ptr(), 1, 64)]
    launch(whole, first)  # of another dtype
    assert len(kernel.compiled) == 2
    assert torch.equal(kernel.compiled[1][1][1], whole[:4])
