"""The CUDA sources compile for every architecture without a GPU, within a budget of registers and spills."""

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="needs cuda-core to compile CUDA C++")

from kernels.selective_scan.cuda import variants
from kernels.selective_scan.cuda.compile import compile_kernel
from kernels.selective_scan.cuda.variants import Variant

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
REGISTERS = 65536  # of a multiprocessor
BLOCK_SHARED_BYTES = 99 * 1024  # the least that a block may have on these architectures
SPILLED_BYTES = {"forward": 32, "backward": 64, "ends": 0, "chained": 64}
BFLOAT16 = 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAMBA_TRAIN_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def resources(cubin: bytes, name: str, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel."""
    triton = pytest.importorskip("triton", reason="needs triton's cuobjdump")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("triton comes without cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def in_turn(states: int, batch: int, channels: int) -> list[Variant]:
    return [choose(states, batch, channels, 132) for choose in (variants.forward_variant, variants.backward_variant)]


def side_by_side(states: int) -> list[Variant]:
    """What segments of time side by side take beside the kernels above."""
    forward, count = variants.forward_plan(states, 1, 2**17, 4096 // states, 132)
    assert count > 1
    return [forward, variants.ends_variant(states, reverse=False), variants.ends_variant(states, reverse=True)]


def check_resources(kernels: list[Variant], arch: str, folder: Path) -> None:
    for variant in kernels:
        cubin = compile_kernel(variant.source, arch, variant.macros(BFLOAT16, gated=True, packed=False, aligned=True))
        registers, stack = resources(cubin, f"scan_{variant.source}", folder)
        assert registers * variant.threads * variant.min_blocks <= REGISTERS
        assert stack <= SPILLED_BYTES[variant.source]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("batch", "channels"), [(8, 5120), (8, 4096), (8, 1536), (4, 5120), (32, 1536)])
def test_16_states_stay_within_their_registers(arch: str, batch: int, channels: int, tmp_path: Path) -> None:
    check_resources(in_turn(16, batch, channels), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chained_warps_stay_within_their_registers(arch: str, tmp_path: Path) -> None:
    kinds = [variants.chained_variant(1, channels, 132) for channels in (2048, 5120)]
    assert [kind.rings for kind in kinds] == [1, 2]
    check_resources(kinds, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_16_states_side_by_side_stay_within_their_registers(arch: str, tmp_path: Path) -> None:
    check_resources(side_by_side(16), arch, tmp_path)


@pytest.mark.parametrize("states", [1, 8, 32, 64, 128, 256])
def test_every_padded_state_count_compiles(states: int) -> None:
    for variant in in_turn(states, 8, 1024) + side_by_side(states):
        for dtype in range(3):
            assert variant.shared_bytes(dtype, gated=True) <= BLOCK_SHARED_BYTES
        compile_kernel(variant.source, "sm_90", variant.macros(BFLOAT16, gated=True, packed=True, aligned=False))


@pytest.mark.parametrize("dtype", range(3))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_option_compiles(dtype: int, gated: bool, packed: bool, aligned: bool) -> None:
    for variant in [*in_turn(16, 8, 5120), *side_by_side(16), variants.chained_variant(1, 5120, 132)]:
        assert variant.shared_bytes(dtype, gated) <= BLOCK_SHARED_BYTES
        compile_kernel(variant.source, "sm_90", variant.macros(dtype, gated, packed, aligned))


MACROS = variants.forward_variant(16, 8, 5120, 132).macros(BFLOAT16, gated=True, packed=False, aligned=True)


def test_the_cache_is_used_and_holds_nothing_but_kernels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernel("forward", "sm_90", MACROS)
    (path,) = cache.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644, "a folder may serve several users"
    with monkeypatch.context() as compiler_gone:
        compiler_gone.setitem(sys.modules, "cuda.core", None)
        assert compile_kernel("forward", "sm_90", MACROS) == first
        with pytest.raises(ImportError):
            compile_kernel("forward", "sm_80", MACROS)
    compile_kernel("forward", "sm_80", MACROS)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-1], lambda b: b[:-1] + b"x"])
def test_a_damaged_file_is_compiled_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    first = compile_kernel("forward", "sm_90", MACROS)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compile_kernel("forward", "sm_90", MACROS) == first
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MAMBA_TRAIN_KERNEL_CACHE", str(tmp_path / "file" / "folder"))
    assert compile_kernel("forward", "sm_90", MACROS)[:4] == b"\x7fELF"


def test_a_full_disk_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kernels.selective_scan.cuda.compile.os.replace", full)
    assert compile_kernel("forward", "sm_90", MACROS)[:4] == b"\x7fELF"
    assert list(cache.iterdir()) == []


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MAMBA_TRAIN_KERNEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert compile_kernel("forward", "sm_90", MACROS)[:4] == b"\x7fELF"
