"""The plan's figures against the model they speak of."""

import pytest
import torch

from mamba_train.composition import compose_config
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.monitor.flops import flops_per_token
from mamba_train.monitor.plan import make_plan

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
