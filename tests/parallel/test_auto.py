import pytest

from mamba_train.composition import compose_config
from mamba_train.config import EngineKind, Recompute
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import auto
from mamba_train.parallel.auto import USED, choose_engine, layers_to_recompute, may_keep_gathered, resolve_auto
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


def test_gathered_weights_stay_where_there_is_room_beside_the_layers_that_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_gpus = ["engine=fsdp", "model=mamba_1.4b", "model.vocab_size=50280", "data.sequence_length=2048"]
    config = compose_config([*two_gpus, "training.micro_batch_size=8", "engine.recompute=none"])
    model = resolve_model_config(config.model, 50280)

    def needed(reshard: bool) -> float:
        config.engine.reshard_after_forward = reshard
        return sum(memory_per_device(config, model, 2).values()) + OVERHEAD_BYTES

    freed, kept = needed(True), needed(False)
    assert kept > freed + GIB
    config.engine.reshard_after_forward = None
    assert may_keep_gathered(config, 2, kept / USED + 1)
    assert not may_keep_gathered(config, 2, kept / USED - 2)
    assert not may_keep_gathered(config, 2, None)
    config.engine.recompute = Recompute.keep_scan
    assert not may_keep_gathered(config, 2, 1e15)

    lines: list[str] = []
    ranks = join()
    monkeypatch.setattr(ranks, "world_size", 2)
    monkeypatch.setattr(ranks, "first", lambda work: work())
    for recompute, device_bytes, expected in (
        ("none", kept / USED + 1, False),
        ("none", freed / USED + 1, True),
        ("auto", kept / USED + 1, False),
        ("auto", freed / USED + 1, True),  # not at the cost of a scan
    ):
        monkeypatch.setattr(auto, "_device_bytes", lambda config, found=device_bytes: found)
        config = compose_config([*two_gpus, "training.micro_batch_size=8", f"engine.recompute={recompute}"])
        chosen = resolve_auto(config, ranks, lines.append)
        assert (chosen.recompute, chosen.reshard_after_forward) == (Recompute.none, expected)
        asked = resolve_auto(compose_config([*two_gpus, "engine.reshard_after_forward=true"]), ranks, lines.append)
        assert asked.reshard_after_forward is True
    assert [line for line in lines if "gathered weights stay" in line] == 2 * [lines[0]]


@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_replicas_that_cannot_be_are_refused_before_memory_is_estimated(
    monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    ranks = join()
    monkeypatch.setattr(ranks, "world_size", 2)
    monkeypatch.setattr(ranks, "first", lambda work: work())
    monkeypatch.setattr(auto, "_device_bytes", lambda config: 80 * GIB)
    config = compose_config(["engine=fsdp", "engine.replicas=4", f"engine.recompute={recompute}", "model=mamba_130m"])
    with pytest.raises(ValueError, match=r"engine\.replicas=4: expected a divisor of the number of processes \(2\)"):
        resolve_auto(config, ranks, print)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine=fsdp", "training.micro_batch_size=4"], None),
        (["engine=fsdp", "training.micro_batch_size=2"], False),
        (["engine=fsdp", "training.micro_batch_size=2", "engine.reduce_each_micro_batch=true"], None),
        (["engine=fsdp", "training.micro_batch_size=2", "engine.cuda_graphs=true"], True),
        (["engine=fsdp", "training.micro_batch_size=4", "engine.replicas=2"], False),
        (["engine=ddp", "training.micro_batch_size=2"], None),
    ],
)
def test_graphs_of_fsdp_are_the_default_where_they_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: bool | None
) -> None:
    """An engine records unless it is told false."""
    lines: list[str] = []
    ranks = join()
    monkeypatch.setattr(ranks, "world_size", 2)
    monkeypatch.setattr(ranks, "first", lambda work: work())
    monkeypatch.setattr(auto, "_device_bytes", lambda config: 80 * GIB)
    config = compose_config([*overrides, "training.global_batch_size=8", "model=mamba_130m", "model.vocab_size=50280"])
    for on_gpu, found in ((True, expected), (False, expected or None)):
        monkeypatch.setattr(auto, "_on_gpu", lambda config, on_gpu=on_gpu: on_gpu)
        assert resolve_auto(config, ranks, lines.append).cuda_graphs is found
    assert sum("no graphs" in line for line in lines) == (expected is False)
