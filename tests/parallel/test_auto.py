import pytest

from mamba_train.composition import compose_config
from mamba_train.config import EngineKind, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import auto
from mamba_train.parallel.auto import USED, choose_engine, layers_to_recompute, resolve_auto
from mamba_train.parallel.memory import OVERHEAD_BYTES, memory_per_device
from mamba_train.ranks import join

GIB = 2**30
ONE_GPU = ["engine=single", "model=mamba_130m", "model.vocab_size=50280", "data.sequence_length=2048"]


@pytest.mark.parametrize(
    ("model", "world_size", "gpu_gib", "expected"),
    [
        ("mamba_130m", 1, 80, "single"),
        ("mamba_130m", 8, 80, "ddp"),
        ("mamba_2.8b", 8, 80, "ddp"),
        ("mamba_2.8b", 8, 40, "fsdp"),
        ("mamba_2.8b", 2, None, "ddp"),
    ],
)
def test_the_choice_follows_processes_and_memory(
    model: str, world_size: int, gpu_gib: int | None, expected: str
) -> None:
    config = compose_config(["engine=auto", f"model={model}", "training.micro_batch_size=1", "model.vocab_size=50280"])
    name, reason = choose_engine(config, world_size, gpu_gib and gpu_gib * GIB)
    assert name is EngineKind(expected)
    if gpu_gib and world_size > 1:
        assert f"of the {gpu_gib:.1f} GiB of a GPU" in reason


def test_the_log_says_why_and_other_names_stay() -> None:
    lines: list[str] = []
    chosen = resolve_auto(compose_config(["engine=auto"]), join(), lines.append)
    assert chosen.name is EngineKind.single
    assert lines == ["engine=auto: single, there is one process"]
    assert resolve_auto(compose_config(["engine=ddp"]), join(), lines.append).name is EngineKind.ddp


def needs(layers: int) -> float:
    """Bytes with so many layers that compute their scan again, besides what memory.py counts for the context."""
    config = compose_config([*ONE_GPU, f"engine.recompute={'scan' if layers else 'none'}"])
    config.engine.recompute_layers = layers or None
    model = resolve_model_config(config.model, 50280)
    return sum(memory_per_device(config, model, 1).values()) + OVERHEAD_BYTES


def test_as_few_layers_as_fit_compute_their_scan_again() -> None:
    config = compose_config(ONE_GPU)
    assert needs(0) > needs(5) > needs(24)
    assert layers_to_recompute(config, 1, 1e12) == 0
    assert layers_to_recompute(config, 1, None) == 0
    assert layers_to_recompute(config, 1, needs(5) / USED + 1) == 5
    assert layers_to_recompute(config, 1, needs(5) / USED - 2) == 6
    assert layers_to_recompute(config, 1, 1) == 24
    assert layers_to_recompute(compose_config([*ONE_GPU, "model=mamba2_130m"]), 1, 1) == 24


def test_what_was_chosen_is_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(auto, "_device_bytes", lambda config: needs(5) / USED + 1)
    chosen = resolve_auto(compose_config(ONE_GPU), join(), lines.append)
    assert (chosen.recompute, chosen.recompute_layers) == (Recompute.scan, 5)
    assert lines == ["engine.recompute=auto: 5 layers compute their scan again, so that a step fits"]
    asked = resolve_auto(compose_config([*ONE_GPU, "engine.recompute=layer"]), join(), lines.append)
    assert asked.recompute is Recompute.layer
    monkeypatch.setattr(auto, "_device_bytes", lambda config: None)
    assert resolve_auto(compose_config(ONE_GPU), join(), lines.append).recompute is Recompute.none
