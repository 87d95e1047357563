"""Run by test_fused_step.py in a process of its own: the kernels of a fused step, interpreted."""

import os

import pytest
import torch

from kernels.decode import greedy, launch, normed, product_in_parts
from kernels.rms_norm import add_rms_norm
from mamba_train.inference.decoder import Decoder
from mamba_train.inference.fused_step import fused_step
from mamba_train.inference.load import inference_model
from mamba_train.model.selective_ssm import SSMState
from tests.model.families import lively, perturbed, small_config

assert os.environ.get("TRITON_INTERPRET") == "1", "the kernels would be compiled, not interpreted"
PROMPTS = [[5, 9, 2], [7], [1, 1, 2, 3, 5, 8]]


@pytest.mark.parametrize(("family", "batch"), [("mamba1", 2), ("mamba2", 2), ("mamba2_groups", 1), ("mamba1_mlp", 1)])
@torch.no_grad()
def test_steps_are_those_of_the_model(family: str, batch: int) -> None:
    prompts = PROMPTS[:batch]
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cpu"), torch.float32)
    wanted, fused = Decoder(model, prompts), Decoder(model, prompts)
    for number in range(2):
        token = torch.arange(len(prompts)) + 7 * number
        logits = fused_step(model, token, fused._state)
        torch.testing.assert_close(logits, wanted.step(token), rtol=1e-4, atol=1e-4)
    for layer, expected in zip(fused._state, wanted._state, strict=True):
        assert isinstance(layer, SSMState)
        assert isinstance(expected, SSMState)
        torch.testing.assert_close(layer.conv, expected.conv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.scan, expected.scan, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2_groups", "mamba1_mlp"])
@torch.no_grad()
def test_steps_of_many_sequences(family: str) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cpu"), torch.float32)
    prompts = [[row % 50, 2 * row % 50] for row in range(18)]
    wanted, fused = Decoder(model, prompts), Decoder(model, prompts)
    for number in range(2):
        token = torch.arange(18) + number
        torch.testing.assert_close(fused_step(model, token, fused._state), wanted.step(token), rtol=1e-4, atol=1e-4)
    for layer, expected in zip(fused._state, wanted._state, strict=True):
        assert isinstance(layer, SSMState)
        assert isinstance(expected, SSMState)
        torch.testing.assert_close(layer.conv, expected.conv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.scan, expected.scan, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "parts"), [(3, 1), (18, 2), (70, 4)])
def test_products_of_many_sequences(rows: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(n, 520, generator=generator)[:, :512] for n in (rows, 70))
    found = product_in_parts(x, weight.contiguous(), parts)
    assert found.shape == (parts, rows, 70)
    torch.testing.assert_close(found.sum(0), x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norm_sums_the_parts_of_a_product(with_residual: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    parts = torch.randn(3, 5, 40, generator=generator)
    residual = torch.randn(5, 40, generator=generator) if with_residual else None
    weight = torch.randn(40, generator=generator)
    found, total = normed(parts, residual, weight, 1e-5)
    wanted, expected = add_rms_norm(parts.sum(0), residual, weight, 1e-5)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mamba1", {"d_state": 65}),
        ("mamba1", {"d_conv": 2, "d_state": 1, "dt_rank": 1}),
        ("mamba2", {"d_conv": 6, "d_state": 33, "head_dim": 20}),
    ],
)
@torch.no_grad()
def test_other_sizes(family: str, sizes: dict[str, int]) -> None:
    trained = perturbed(small_config(family, n_layer=1, **sizes))
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cpu"), torch.float32)
    for rows in (2, 3):
        wanted, fused = (Decoder(model, PROMPTS[:rows]) for _ in range(2))
        for token in torch.tensor([[3, 1, 4], [0, 5, 6]])[:, :rows]:
            found = fused_step(model, token, fused._state)
            torch.testing.assert_close(found, wanted.step(token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("family", "rows"), [("mamba1", 1), ("mamba1", 3), ("mamba2", 1), ("mamba2", 3)])
@torch.no_grad()
def test_a_narrower_state_is_rounded_at_each_step(family: str, rows: int, dtype: torch.dtype) -> None:
    trained = lively(family)
    model = inference_model(trained.config, dict(trained.named_parameters()), torch.device("cpu"), torch.float32)
    wanted, fused = (Decoder(model, PROMPTS[:rows], state_dtype=dtype) for _ in range(2))
    token = torch.arange(3, 3 + rows)
    torch.testing.assert_close(fused_step(model, token, fused._state), wanted.step(token), rtol=1e-4, atol=1e-4)
    if dtype == torch.bfloat16:
        return
    model.layers[0].mixer.ssm.dt_bias += 1e7  # type: ignore[union-attr,operator]
    fused_step(model, token, fused._state)
    wanted.step(token)
    found, expected = (decoder._state[0].scan for decoder in (fused, wanted))  # type: ignore[union-attr]
    assert (found.abs() == 65504).any()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_likely_token_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = torch.randn(7, 60, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[0, [9, 40]] = 8
    logits[1, 50:] = 9  # padding
    logits[2, 7], logits[3, 7], logits[4, 7] = float("inf"), float("nan"), float("-inf")
    logits[5, 55] = float("nan")  # in the padding
    logits[6] = -3e38
    expected = torch.where(logits[:, :50].isfinite().all(-1), logits[:, :50].float().argmax(-1), -1)
    expected[6] = 0
    for block in (16, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "GREEDY_BLOCK", block)
            assert greedy(logits, 50, -1).tolist() == expected.tolist()
