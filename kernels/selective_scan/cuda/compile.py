"""CUDA C++ to machine code at run time, by NVRTC through `cuda.core`, kept on disk.

The sources include no header, so a kernel takes less than a second and needs nothing beside the NVRTC that comes with
torch. A compiled kernel is a file named by a hash of everything it depends on, written aside and renamed: any number of
processes may share the folder, and the worst that a race costs is compiling twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent


def cache_folder() -> Path:
    """Where compiled kernels are kept: MAMBA_TRAIN_KERNEL_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MAMBA_TRAIN_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mamba-train" / "kernels"


@functools.cache
def _source(name: str) -> str:
    return (SOURCES / "common.cuh").read_text() + (SOURCES / f"{name}.cu").read_text()


@functools.cache
def compiler_version() -> str:
    """The version of NVRTC; raises when it, or the package that calls it, can't be loaded."""
    from cuda.bindings import nvrtc

    result, major, minor = nvrtc.nvrtcVersion()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC does not say its version: {result}")
    return f"{major}.{minor}"


def compile_kernel(name: str, arch: str, macros: Mapping[str, int]) -> bytes:
    """Return the cubin of `name`.cu for `arch` ("sm_90"), from the cache where it is there."""
    definitions = sorted((key, str(value)) for key, value in macros.items())
    key = hashlib.sha256(repr((_source(name), definitions, arch, compiler_version())).encode()).hexdigest()
    path = cache_folder() / f"{name}_{arch}_{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, std="c++17", define_macro=definitions)
    cubin = bytes(Program(_source(name), "c++", options).compile("cubin").code)
    _keep(path, cubin)
    return cubin


def _keep(path: Path, content: bytes) -> None:
    """Write a file so that no reader ever sees half of it; a folder that can't be written costs only the cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass
