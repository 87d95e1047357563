"""CUDA C++ to machine code at run time, by NVRTC through `cuda.core`, kept on disk.

The sources include no header, so a kernel takes less than a second and needs nothing beside the NVRTC that comes with
torch. A compiled kernel is a file named by a hash of everything it depends on, written aside and renamed: any number of
processes may share the folder, and the worst that a race, a damaged file or a full disk costs is compiling again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent
STANDARD = "c++17"
DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: MAMBA_TRAIN_KERNEL_CACHE, or the user's cache folder; None without a home."""
    chosen = os.environ.get("MAMBA_TRAIN_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "mamba-train" / "kernels"
    except RuntimeError:  # containers run under user numbers that nobody has a home for
        return None


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
    content = (_source(name), definitions, arch, STANDARD, compiler_version())
    key = hashlib.sha256(repr(content).encode()).hexdigest()
    folder = cache_folder()
    path = None if folder is None else folder / f"{name}_{arch}_{key[:32]}.cubin"
    if path is not None and (kept := _kept(path)) is not None:
        return kept
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, std=STANDARD, define_macro=definitions)
    cubin = bytes(Program(_source(name), "c++", options).compile("cubin").code)
    if path is not None:
        _keep(path, cubin)
    return cubin


def _kept(path: Path) -> bytes | None:
    """The content of a file of the cache, None where there is none or it is not what was written."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def _keep(path: Path, content: bytes) -> None:
    """Write a file so that no reader ever sees half of it; a folder that can't be written costs only the cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            aside = Path(file.name)
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                aside.chmod(0o644)  # a folder may serve several users
                os.replace(aside, path)
            except OSError:
                aside.unlink(missing_ok=True)
    except OSError:
        pass
