import pytest

from mamba_train.composition import compose_config
from mamba_train.config import EngineKind
from mamba_train.parallel.auto import choose_engine, resolve_auto
from mamba_train.ranks import join

GIB = 2**30


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
