"""The fused mixers on a GPU: against fp64, run twice, in a CUDA graph, compiled."""

import pytest
import torch
from torch import Tensor, nn

from mamba_train.config import ModelConfig
from mamba_train.model.mixers import Mamba1Mixer, Mamba2Mixer
from tests.gpu.errors import poisoned  # noqa: F401
from tests.model.families import perturbed, small_config
from tests.model.test_fused_ssm import gradients, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = ModelConfig(d_model=96, n_layer=1, d_state=16, dt_rank=6)


def make_mixer(recompute: bool) -> Mamba1Mixer:
    torch.manual_seed(0)
    mixer = Mamba1Mixer(CONFIG)
    for name, parameter in mixer.named_parameters():
        scale = {"in_proj.weight": 0.1, "out_proj.weight": 0.07, "ssm.x_proj_weight": 0.07}.get(name, 0.5)
        parameter.data = scale * torch.randn_like(parameter)
    mixer.ssm.recompute_scan = recompute
    return mixer.cuda()


def make_hidden() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 333, CONFIG.d_model, generator=generator).bfloat16()
    return hidden.cuda().requires_grad_(), (torch.arange(333, dtype=torch.int32).cuda() // 70).expand(3, -1)


def forward(mixer: nn.Module, hidden: Tensor, seq_idx: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        return mixer(hidden, seq_idx)


def on_gpu(mixer: nn.Module, hidden: Tensor, y: Tensor) -> dict[str, Tensor]:
    weights = dict(mixer.named_parameters())
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return dict(zip(["hidden", *weights], torch.autograd.grad(y, [hidden, *weights.values()], direction), strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("recompute", [False, True])
def test_against_fp64(recompute: bool) -> None:
    mixer, (hidden, seq_idx) = make_mixer(recompute), make_hidden()
    y = forward(mixer, hidden, seq_idx)
    found, again = (on_gpu(mixer, hidden, forward(mixer, hidden, seq_idx)) for _ in range(2))
    exact = make_mixer(recompute).double().cpu()
    for linear in (exact.in_proj, exact.out_proj):
        linear.weight.data = linear.weight.data.bfloat16().double()
    for weight in (exact.ssm.x_proj_weight, exact.ssm.dt_proj_weight):
        weight.data = weight.data.bfloat16().double()
    hidden64 = hidden.detach().cpu().double().requires_grad_()
    y64 = plain(exact, hidden64, seq_idx.cpu(), (6, 16, 16))
    assert (y.cpu() - y64).norm() < 2e-2 * y64.norm()
    for name, grad in gradients(exact, hidden64, y64).items():
        assert torch.equal(found[name], again[name]), name
        error = float((found[name].cpu() - grad).norm() / grad.norm())
        assert error < 2e-2, f"{name}: {error}"


def test_both_policies_give_the_same_bits() -> None:
    hidden, seq_idx = make_hidden()
    found = [on_gpu(m, hidden, forward(m, hidden, seq_idx)) for m in (make_mixer(False), make_mixer(True))]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.usefixtures("poisoned")
def test_both_policies_give_mamba2_the_same_bits() -> None:
    """The states that the forward keeps are those that the backward computes again."""
    torch.manual_seed(0)
    mixer = Mamba2Mixer(ModelConfig(d_model=96, n_layer=1, head_dim=64, d_state=128)).cuda()
    for parameter in mixer.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    (hidden, seq_idx), found = make_hidden(), []
    for recompute in (False, True):
        mixer.ssm.recompute_scan = recompute
        found.append(on_gpu(mixer, hidden, forward(mixer, hidden, seq_idx)))
    for name, grad in found[0].items():
        assert grad.isfinite().all(), name
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_memory(recompute: bool) -> None:
    """In activations of d_inner: x, z, the convolution's output, Δ, y before the gate, two for the states; two for the
    gradients of x and z, of which y's has one before; at most two for parts of dB and dC; the mixer's output and its
    gradient, a half each."""
    torch.manual_seed(0)
    width = 512
    mixer = Mamba1Mixer(ModelConfig(d_model=width, n_layer=1, dt_rank=32)).cuda()
    for parameter in mixer.parameters():
        parameter.data = 0.05 * torch.randn_like(parameter)
    mixer.ssm.recompute_scan = recompute
    hidden = torch.randn(8, 2048, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = mixer(hidden)
        torch.autograd.grad(y, [hidden, *mixer.parameters()], torch.ones_like(y))

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    activation = 2 * hidden.nbytes
    assert torch.cuda.max_memory_allocated() - before < 12.6 * activation


def test_a_cuda_graph_of_a_step() -> None:
    """Forward, backward and update, captured once and replayed on other inputs."""
    mixer, (hidden, seq_idx) = make_mixer(True), make_hidden()
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-2, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = forward(mixer, hidden, seq_idx).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    start = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    inputs = [torch.randn_like(hidden) for _ in range(3)]

    def run(step_once) -> list[float]:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                parameter.copy_(start[name])
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        losses = []
        for values in inputs:
            hidden.data.copy_(values)
            losses.append(float(step_once()))
        return losses

    torch.cuda.synchronize()  # the other stream does not wait for the inputs
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    eager = run(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    replayed = run(lambda: (graph.replay(), captured)[1])
    assert eager == replayed
    assert eager[0] != eager[1]


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled(recompute: bool) -> None:
    mixer, (hidden, seq_idx) = make_mixer(recompute), make_hidden()
    compiled = torch.compile(mixer, fullgraph=True)
    y = forward(mixer, hidden, seq_idx)
    expected = on_gpu(mixer, hidden, y)
    found = on_gpu(mixer, hidden, forward(compiled, hidden, seq_idx))  # type: ignore[arg-type]
    for name, grad in expected.items():
        assert (found[name] - grad).norm() < 1e-2 * grad.norm(), name


def test_a_compiled_model_is_one_graph() -> None:
    config = small_config("mamba1", d_model=64, d_state=16)
    model = perturbed(config).cuda()
    for block in model.blocks():
        block.mixer.ssm.recompute_scan = True  # type: ignore[attr-defined]
    tokens = torch.randint(0, 53, (2, 65), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses, grads = [], []
    for call in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = call(inputs, targets)
        losses.append(float(loss))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert (found - expected).norm() < 5e-2 * expected.norm()
