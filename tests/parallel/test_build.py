"""Which engine, and what stops it before anything is made."""

import os
import re
from pathlib import Path

import pytest

from mamba_train.config import DeviceKind, EngineConfig, EngineKind
from mamba_train.parallel import zero
from mamba_train.parallel.build import build_engine
from mamba_train.ranks import Launch, Ranks, join


def test_deepspeed_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    config = EngineConfig(name=EngineKind.deepspeed, device=DeviceKind.cpu)
    with pytest.raises(ValueError, match=r"engine=deepspeed: DeepSpeed is not installed; pip install"):
        build_engine(config, join())


def test_one_engine_for_several_processes_is_refused() -> None:
    several = Ranks(Launch(0, 4, 0), join().store)
    with pytest.raises(ValueError, match="4 were started; use engine=ddp or engine=fsdp"):
        build_engine(EngineConfig(name=EngineKind.single, device=DeviceKind.cpu), several)


def test_replicas_must_divide_the_ranks() -> None:
    several = Ranks(Launch(0, 4, 0), join().store)
    config = EngineConfig(name=EngineKind.fsdp, device=DeviceKind.cpu, replicas=3)
    with pytest.raises(ValueError, match=r"engine\.replicas=3: expected a divisor of the number of processes \(4\)"):
        build_engine(config, several)


def test_the_training_knows_no_engine(repository: Path) -> None:
    """What differs between engines is behind the protocol."""
    may_be_imported = {"engine", "build", "auto", "state"}
    for path in (repository / "mamba_train" / "training").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "EngineKind" not in source, path
        assert set(re.findall(r"mamba_train\.parallel\.(\w+)", source)) <= may_be_imported, path


def test_the_kernel_cache_is_where_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("MAMBA_TRAIN_KERNEL_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for name in variables:
        monkeypatch.setenv(name, "before")
    build_engine(EngineConfig(device=DeviceKind.cpu, kernel_cache=str(tmp_path / "cache")), join())
    assert all(os.environ[name].startswith(str(tmp_path / "cache")) for name in variables)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"engine\.kernel_cache=.*file/cache: it cannot be made"):
        build_engine(EngineConfig(device=DeviceKind.cpu, kernel_cache=str(tmp_path / "file" / "cache")), join())
