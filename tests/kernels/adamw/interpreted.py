"""AdamW's Triton kernel on the CPU, against torch's in fp64; test_triton.py runs this."""

import os

import pytest
import torch
from torch import Tensor

from kernels.adamw import FusedAdamW, Parameter, launch

assert os.environ.get("TRITON_INTERPRET") == "1", "the kernel would be compiled, not interpreted"
BETAS, EPS = (0.9, 0.999), 1e-2  # as large as some gradients
SIZES = {"multiples of four": [(8, 24), (64,), (4,)], "any": [(5, 7), (1,), (33,), (0, 3)]}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several blocks, the last of them not full."""
    monkeypatch.setattr(launch, "BLOCK", 32)


class Pair:
    """The same parameters twice: for torch's optimiser in fp64, and for ours."""

    def __init__(self, shapes: list[tuple[int, ...]], decays: list[float]) -> None:
        self.ours = [torch.randn(shape) for shape in shapes]
        self.exact = [t.double().requires_grad_() for t in self.ours]
        groups = [{"params": [t], "weight_decay": d} for t, d in zip(self.exact, decays, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS)
        self.copies = [torch.empty_like(t, dtype=torch.bfloat16) if t.ndim > 1 else None for t in self.ours]
        state = [[torch.zeros_like(t), torch.zeros_like(t), torch.zeros(())] for t in self.ours]
        rows = zip(self.ours, state, decays, self.copies, strict=True)
        self.parameters = [Parameter(weight, *moments, decay, copy) for weight, moments, decay, copy in rows]
        self.update = FusedAdamW(self.parameters, *BETAS, EPS)

    def step(self, gradients: list[Tensor], lr: float, divisor: float) -> None:
        for t, gradient in zip(self.exact, gradients, strict=True):
            t.grad = gradient.double() / divisor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.update(gradients, torch.tensor(lr), torch.tensor(divisor))

    def check(self) -> None:
        for p, exact in zip(self.parameters, self.exact, strict=True):
            torch.testing.assert_close(p.weight.double(), exact.detach(), rtol=1e-6, atol=1e-6)
            state = self.optimizer.state[exact]
            torch.testing.assert_close(p.first.double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(p.second.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)
            assert p.step == state["step"]
            if p.copy is not None:
                # Cut off by the interpreter, rounded by a GPU: tests/gpu/test_adamw.py.
                torch.testing.assert_close(p.copy.float(), p.weight, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("shapes", list(SIZES.values()), ids=list(SIZES))
def test_steps_are_those_of_torch(shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    pair = Pair(shapes, [0.1, 0.0, 0.3, 0.0][: len(shapes)])
    for number in range(4):
        gradients = [torch.randn(shape) * 10.0**-number for shape in shapes]
        pair.step(gradients, lr=1e-2 / (number + 1), divisor=1.0 + number)
    assert pair.update._align == (4 if shapes == SIZES["multiples of four"] else 1)
    pair.check()


def test_a_gradient_that_moves_is_followed_and_one_off_the_grid_read() -> None:
    torch.manual_seed(0)
    pair = Pair([(8, 24)], [0.1])
    buffer = torch.randn(400)
    for first in (0, 8, 3, 0):
        pair.step([buffer[first : first + 192].view(8, 24)], lr=1e-2, divisor=2.0)
        assert pair.update._align == (4 if first % 4 == 0 else 1)
    pair.check()


def test_betas_of_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8)
    exact = weight.double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], lr=1e-2, betas=(0.0, 0.0), eps=EPS, weight_decay=0.0)
    update = FusedAdamW([Parameter(weight, *torch.zeros(2, 8), torch.zeros(()), 0.0, None)], 0.0, 0.0, EPS)
    for _ in range(2):
        exact.grad = torch.randn(8).double()
        optimizer.step()
        update([exact.grad.float()], torch.tensor(1e-2), torch.tensor(1.0))
    torch.testing.assert_close(weight.double(), exact.detach(), rtol=1e-6, atol=1e-6)
