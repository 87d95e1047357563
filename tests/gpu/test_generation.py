"""Decoding as a CUDA graph gives the tokens of the step that is not one."""

import pytest
import torch

from kernels import dispatch
from mamba_train.config import MixerKind, ModelConfig
from mamba_train.inference.decoder import Decoder
from mamba_train.inference.fused_step import can_fuse, fused_step
from mamba_train.inference.generate import generate
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from mamba_train.model.language_model import MambaLM, resolve_model_config
from tests.model.families import lively

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [[5, 9, 2], [7], [1, 1, 2, 3, 5, 8, 13, 21, 34]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2_groups", "mamba1_mlp"])
def test_graph_and_plain_step_give_the_same_tokens(family: str, dtype: torch.dtype) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cuda"), dtype)
    for sampling in (Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=1)):
        for state_dtype in (torch.float32, torch.float16, torch.bfloat16):
            plain, graphed = (
                generate(
                    *(model, PROMPTS, sampling),
                    max_new_tokens=150,
                    vocab_size=53,
                    cuda_graph=cuda_graph,
                    state_dtype=state_dtype,
                )
                for cuda_graph in (False, True)
            )
            assert plain == graphed
            assert len({token for row in plain for token in row}) > 10


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2_groups", "mamba1_mlp"])
def test_greedy_tokens_are_those_of_the_parallel_form(family: str, batch: int) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cuda"), torch.float32)
    prompts = PROMPTS[-batch:]
    rows = generate(model, prompts, Sampling(temperature=0), max_new_tokens=150, vocab_size=53)
    for prompt, tokens in zip(prompts, rows, strict=True):
        picked = model(torch.tensor([prompt + tokens], device="cuda"))[0, :, :53].argmax(-1)
        assert picked[len(prompt) - 1 : -1].tolist() == tokens


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16), (40, torch.bfloat16)],
)
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2_groups", "mamba1_mlp"])
@torch.no_grad()
def test_fused_steps_are_those_of_the_model(family: str, batch: int, dtype: torch.dtype) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cuda"), dtype)
    assert can_fuse(model, batch)
    prompts = (14 * PROMPTS)[:batch]
    plain, fused = (Decoder(model, prompts, cuda_graph=False) for _ in range(2))
    for number in range(10):
        token = (torch.arange(batch, device="cuda") + 3 * number) % 53
        wanted, plain._state = model.step(token, plain._state, in_place=True)
        found = fused_step(model, token, fused._state)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert float((found - wanted).float().norm() / wanted.float().norm()) < tolerance, number


def model_of_real_width(mixer: MixerKind) -> MambaLM:
    """Wide enough that the programs of a kernel do not all run at once."""
    config = ModelConfig(name="wide", n_layer=6, d_model=1536, mixer=mixer, d_state=128 if "2" in mixer else 16)
    config = resolve_model_config(config, tokenizer_vocab_size=5000)
    with torch.device("meta"):
        empty = MambaLM(config)
    torch.manual_seed(0)
    weights = {name: torch.randn(p.shape, device="cuda") * 0.05 for name, p in empty.named_parameters()}
    return inference_model(config, weights, torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("mixer", "batch"), [(MixerKind.mamba1, 2), (MixerKind.mamba1, 40), (MixerKind.mamba2, 2), (MixerKind.mamba2, 40)]
)
@torch.no_grad()
def test_kernels_that_start_early_change_no_bit(mixer: MixerKind, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_real_width(mixer)
    found = []
    prompts = (14 * PROMPTS)[:batch]
    for early, cuda_graph in ((True, True), (True, False), (False, False)):
        if not early:
            monkeypatch.setattr(dispatch, "can_start_early", lambda index: False)
        decoder = Decoder(model, prompts, cuda_graph=cuda_graph)
        token = torch.arange(batch, device="cuda")
        steps = []
        for _ in range(100):
            logits = decoder.step(token)
            token = logits.argmax(-1)
            steps.append(logits.clone())
        found.append(torch.stack(steps))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
