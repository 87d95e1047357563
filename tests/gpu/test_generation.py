"""Decoding as a CUDA graph gives the tokens of the step that is not one."""

import pytest
import torch

from mamba_train.inference.generate import generate
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from tests.model.families import lively

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [[5, 9, 2], [7], [1, 1, 2, 3, 5, 8, 13, 21, 34]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2_groups", "mamba1_mlp"])
def test_graph_and_plain_step_give_the_same_tokens(family: str, dtype: torch.dtype) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cuda"), dtype)
    for sampling in (Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=1)):
        for state_dtype in (torch.float32, torch.bfloat16):
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


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_greedy_tokens_are_those_of_the_parallel_form(family: str) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cuda"), torch.float32)
    rows = generate(model, PROMPTS, Sampling(temperature=0), max_new_tokens=150, vocab_size=53)
    for prompt, tokens in zip(PROMPTS, rows, strict=True):
        picked = model(torch.tensor([prompt + tokens], device="cuda"))[0, :, :53].argmax(-1)
        assert picked[len(prompt) - 1 : -1].tolist() == tokens
