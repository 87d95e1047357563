"""What a device will hold, against the model, the optimiser and the graph that the figures speak of."""

import dataclasses
import math

import pytest
import torch

from kernels.linear_cross_entropy.fused import _buffers
from kernels.linear_cross_entropy.reference import default_chunk_size
from mamba_train.composition import compose_config
from mamba_train.config import Config, ModelConfig, Recompute
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, padded_vocab_size, resolve_model_config
from mamba_train.parallel.memory import activation_bytes, activation_bytes_per_token, fits, memory_per_device, remedy
from tests.convert.models import ALL

CONFIG = [
    "model=mamba_130m",
    "engine.recompute=none",
    "data.sequence_length=64",
    "training.total_steps=1000",
    "training.global_batch_size=8",
]
N_130M = 129_135_360
GIB = 2**30


def planned(*overrides: str) -> tuple[Config, ModelConfig]:
    config = compose_config([*CONFIG, *overrides])
    return config, resolve_model_config(config.model, 50277)


def fixed_bytes(memory: dict[str, int]) -> int:
    return sum(memory[name] for name in memory if name.startswith(("weights", "gradients (fp32", "AdamW")))


@pytest.mark.parametrize(
    ("engine", "world_size", "bytes_per_parameter"),
    [
        ("engine=single", 1, 16),
        ("engine=ddp", 8, 16),
        ("engine=fsdp", 8, 2),
        ("engine=fsdp engine.replicas=2", 8, 4),
        ("engine=deepspeed engine.zero_stage=1", 8, 8 + 1),
        ("engine=deepspeed engine.zero_stage=2", 8, 4 + 0.5 + 1),
        ("engine=deepspeed engine.zero_stage=3", 8, 2),
    ],
)
def test_weights_gradients_and_moments(engine: str, world_size: int, bytes_per_parameter: float) -> None:
    config, model = planned(*engine.split(), "engine.precision=fp32", "training.micro_batch_size=1")
    memory = memory_per_device(config, model, world_size)
    assert fixed_bytes(memory) == pytest.approx(bytes_per_parameter * N_130M, rel=1e-6)
    assert not any("bf16" in name for name in memory)


def test_what_accumulation_under_fsdp_costs() -> None:
    without, model = planned("engine=fsdp", "training.micro_batch_size=4")
    accumulating, _ = planned("engine=fsdp", "training.micro_batch_size=1")
    summing_each, _ = planned("engine=fsdp", "training.micro_batch_size=1", "engine.reduce_each_micro_batch=true")
    recorded, _ = planned("engine=fsdp", "training.micro_batch_size=1", "engine.cuda_graphs=true")
    key = "whole gradients of accumulation (fp32)"
    assert key not in memory_per_device(without, model, 2)
    assert memory_per_device(accumulating, model, 2)[key] == 4 * N_130M
    assert key not in memory_per_device(summing_each, model, 2)
    assert memory_per_device(recorded, model, 2) == memory_per_device(summing_each, model, 2)


def total(*overrides: str, world_size: int = 2) -> int:
    config, model = planned(*overrides)
    return sum(memory_per_device(config, model, world_size).values())


def test_what_takes_the_place_of_something_else_is_not_added_to_it() -> None:
    """The backward pass frees activations while it makes gradients, so the larger of the two counts."""
    long, short = "data.sequence_length=8192", "data.sequence_length=64"
    rows, one_row = "training.micro_batch_size=4", "training.micro_batch_size=2"
    single = ("engine=single", rows)
    gradients = 4 * N_130M
    # With a second micro-batch the gradients of the first one are there beside the activations.
    once, twice = (total(*single, f"training.global_batch_size={n}", long, world_size=1) for n in (4, 8))
    assert twice - once == gradients
    config, model = planned(*single, "training.global_batch_size=4", long)
    without = sum(size for name, size in memory_per_device(config, model, 1).items() if "activations" not in name)
    activations = activation_bytes(model, 2, Recompute.none, 4 * 8192)
    assert once == pytest.approx(without - gradients + activations, abs=2)
    # Short activations: the gradients count whole, and of the activations those of one layer.
    few = activation_bytes(model, 2, Recompute.none, 4 * 64)
    config, _ = planned(*single, "training.global_batch_size=4", short)
    (kept,) = (size for name, size in memory_per_device(config, model, 1).items() if "activations" in name)
    assert kept == pytest.approx(few / model.n_layer, abs=2)
    # Buckets of DDP and of ZeRO-3 are there all the time.
    for engine in ("engine=ddp", "engine=deepspeed engine.zero_stage=3"):
        config, _ = planned(*engine.split(), "training.global_batch_size=4", one_row, long)
        assert memory_per_device(config, model, 2)["activations (estimate)"] == activation_bytes(
            model, 2, Recompute.none, 2 * 8192
        )
    # Under FSDP2 the sharded gradient takes the place of the whole one.
    config, _ = planned("engine=fsdp", "training.global_batch_size=8", one_row, long)
    memory = memory_per_device(config, model, 2)
    assert memory["whole gradients of accumulation (fp32)"] == gradients
    assert "gradients (fp32, sharded)" not in memory


def test_the_remedy_fits_and_is_the_least_that_does() -> None:
    config, model = planned("engine=ddp", "training.micro_batch_size=4", "data.sequence_length=2048")
    needed = sum(memory_per_device(config, model, 2).values())
    assert fits(config, model, 2, needed + 4 * GIB)
    assert remedy(config, model, 2, needed + 2 * GIB) == "engine.recompute=scan"
    assert remedy(config, model, 2, 3.2 * GIB) is None
    advice = remedy(config, model, 2, 5.5 * GIB)
    assert advice is not None
    changed = compose_config([*CONFIG, "engine=ddp", "data.sequence_length=2048", *advice.split()])
    assert fits(changed, model, 2, 5.5 * GIB)


def test_the_remedy_is_not_held_up_by_a_number_of_layers() -> None:
    asked = ("engine=single", "data.sequence_length=2048", "engine.recompute=scan", "engine.recompute_layers=3")
    config, model = planned(*asked)
    for limit in (10 * GIB, 7 * GIB):
        assert not fits(config, model, 1, limit)
        advice = remedy(config, model, 1, limit)
        assert advice is not None
        changed = compose_config([*CONFIG, *asked, *advice.split()])  # which refuses what does not go together
        assert fits(changed, model, 1, limit), advice


def test_recomputing_keeps_less() -> None:
    _, model = planned()
    kept = {policy.value: activation_bytes(model, 2, policy, 2048) for policy in Recompute}
    assert kept["none"] > kept["keep_scan"] > kept["scan"] == kept["auto"] > kept["layer"] > 0


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
    config = resolve_model_config(dataclasses.replace(family, d_model=2 * family.d_model), 300)
    measured = saved_bytes_per_token(config, config.n_layer)
    estimate = activation_bytes_per_token(config, value_bytes=4)
    assert math.log2(measured / estimate) == pytest.approx(0, abs=1)


@pytest.mark.parametrize("length", [64, 2048, 32768])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_loss_is_told_by_its_buffers(length: int, precision: str) -> None:
    config, model = planned(
        f"data.sequence_length={length}", "training.micro_batch_size=4", f"engine.precision={precision}"
    )
    n_classes = padded_vocab_size(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    hidden = torch.empty(4 * length, model.d_model, dtype=dtype, device="meta")
    chunk_size = default_chunk_size(hidden, torch.empty(n_classes, model.d_model, device="meta"))
    buffers = _buffers(hidden, n_classes, chunk_size, with_grad=True)
    held = sum({id(buffer): buffer.numel() * buffer.element_size() for buffer in buffers}.values())
    row = memory_per_device(config, model, 1)["logits chunk and gradient of the head"]
    assert row == pytest.approx(held + 4 * n_classes * model.d_model, rel=0.05), "a chunk is whole tiles"
