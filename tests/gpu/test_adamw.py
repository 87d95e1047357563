"""The update in one launch beside torch's fused AdamW, on tensors of a model's sizes and on odd ones."""

import pytest
import torch

from kernels.adamw import FusedAdamW, Parameter
from mamba_train.config import EngineConfig, ModelConfig, OptimConfig
from mamba_train.model.language_model import resolve_model_config
from mamba_train.model.mixers import Mamba1Mixer
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import join

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


@pytest.mark.parametrize("recorded", [True, False])
def test_an_engine_computes_with_what_its_weights_are_now(recorded: bool) -> None:
    """The kernel changes weights without torch noting it: copies and A must follow all the same."""
    config = resolve_model_config(ModelConfig(name="test", n_layer=2, d_model=64, d_state=16), tokenizer_vocab_size=97)
    engine = NativeEngine(EngineConfig(cuda_graphs=recorded), join())
    engine.prepare(config, OptimConfig(lr=1e-2), seed=0)
    before = {name: p.detach().clone() for name, p in engine._parameters.items()}
    for _ in range(5):
        for tokens in torch.randint(0, 97, (2, 3, 65), device="cuda"):
            engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(384.0, device="cuda"))
        engine.step(1e-2)
        assert engine._fused_adamw is not None
        assert engine._casts is not None
        assert all(torch.equal(copy, weight.bfloat16()) for weight, copy in engine._casts.copies.items())
        for block in engine._bare_model.blocks():
            assert isinstance(block.mixer, Mamba1Mixer)
            assert block.mixer.ssm.derived is not None
            assert torch.equal(block.mixer.ssm.derived.A, -torch.exp(block.mixer.ssm.A_log))
    assert engine._graphed is None or engine._graphed_update._graph is not None, "the update was not recorded"
    assert all(not torch.equal(p, before[name]) for name, p in engine._parameters.items())
    assert {float(engine._optimizer.state[p]["step"]) for p in engine._parameters.values()} == {5.0}
