"""The plan's figures against the model, the optimiser and the graph they speak of."""

import math

import pytest
import torch

from mamba_train.composition import compose_config
from mamba_train.config import ModelConfig
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.monitor.flops import flops_per_token
from mamba_train.monitor.plan import activation_bytes_per_token, make_plan
from tests.convert.models import ALL

CONFIG = ["model=mamba_130m", "data.sequence_length=64", "training.total_steps=1000", "training.global_batch_size=8"]


def test_parameters_and_flops_are_those_of_the_built_model() -> None:
    for model in ("mamba_tiny", "mamba_1.4b", "mamba2_130m", "mamba2attn_2.7b", "transformerpp_130m"):
        config = compose_config([f"model={model}"])
        plan = make_plan(config, 50277)
        resolved = resolve_model_config(config.model, 50277)
        with torch.device("meta"):
            built = MambaLM(resolved)
        assert plan.n_parameters == sum(parameter.numel() for parameter in built.parameters())
        assert plan.flops == flops_per_token(resolved, 256)


def test_what_is_kept_and_how_long_it_takes() -> None:
    plan = make_plan(
        compose_config([*CONFIG, "checkpoint.keep_last=3", "checkpoint.permanent_interval_steps=400"]), 50277
    )
    # The last three, the best, the one being written, and those of steps 400 and 800.
    assert plan.kept_checkpoints == 7
    assert plan.checkpoint_bytes == 12 * 129_135_360
    assert plan.total_tokens == 1000 * 8 * 64
    assert plan.device_hours(1e12, 0.5) == pytest.approx(3 * plan.flops.forward * 512_000 / 0.5e12 / 3600)


def test_weights_gradients_and_moments_are_16_bytes_per_parameter() -> None:
    memory = make_plan(compose_config([*CONFIG, "engine.precision=fp32"]), 50277).memory_bytes
    fixed = [size for name, size in memory.items() if "fp32" in name]
    assert sum(fixed) == 16 * 129_135_360
    assert not any("bf16" in name for name in memory)


def saved_bytes_per_token(config: ModelConfig, n_layer: int) -> float:
    """Bytes that autograd keeps of each token, counted at the graph itself."""
    batch, length = 2, 256
    model = MambaLM(config)
    initialise_(model, config, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, 300, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in storages.values()) / (batch * length)


@pytest.mark.parametrize("family", ALL, ids=lambda config: config.name)
def test_the_activation_estimate_is_near_what_autograd_keeps(family: ModelConfig) -> None:
    """In fp32 on the CPU, whose operators save more states than the formula's: within a factor of two."""
    torch.set_num_threads(1)
    import dataclasses

    config = resolve_model_config(dataclasses.replace(family, d_model=2 * family.d_model), 300)
    measured = saved_bytes_per_token(config, config.n_layer)
    estimate = activation_bytes_per_token(config, value_bytes=4)
    assert math.log2(measured / estimate) == pytest.approx(0, abs=1)
