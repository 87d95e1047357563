"""The update in one launch beside torch's fused AdamW, on tensors of a model's sizes and on odd ones."""

import pytest
import torch

from kernels.adamw import FusedAdamW, Parameter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
SHAPES = {"model": [(4096, 1024), (1024, 2048), (96, 2048), (2048,), (2048, 4)], "odd": [(257, 33), (1,), (4099,)]}


@pytest.mark.parametrize("shapes", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("divisor", [1.0, 3.7])
def test_it_is_as_exact_as_that_of_torch(shapes: list[tuple[int, ...]], divisor: float) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(shape, device="cuda") for shape in shapes]
    theirs, exact = [t.clone() for t in ours], [t.double() for t in ours]
    optimizers = []
    for weights in (theirs, exact):
        for weight in weights:
            weight.requires_grad_()
        optimizers.append(torch.optim.AdamW(weights, 1e-2, BETAS, EPS, DECAY, fused=True))
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in ours]
    state = [(torch.zeros_like(t), torch.zeros_like(t), torch.zeros((), device="cuda")) for t in ours]
    rows = [Parameter(w, *moments, DECAY, copy) for w, moments, copy in zip(ours, state, copies, strict=True)]
    update = FusedAdamW(rows, *BETAS, EPS)
    lr, divide_by = torch.tensor(1e-2, device="cuda"), torch.tensor(divisor, device="cuda")
    for _ in range(5):
        gradients = [torch.randn_like(t) for t in ours]
        for weights in (theirs, exact):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = (gradient.double() / divisor).to(weight.dtype)
        for optimizer in optimizers:
            optimizer.step()
        update(gradients, lr, divide_by)
    for our, their, right, copy in zip(ours, theirs, exact, copies, strict=True):
        errors = [float((t.detach().double() - right.detach()).norm()) for t in (our, their)]
        assert errors[0] <= 1.5 * errors[1] + 1e-7 * float(right.detach().norm()), errors
        assert torch.equal(copy, our.bfloat16())
