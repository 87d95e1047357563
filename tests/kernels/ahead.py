"""Triton kernels compiled for an architecture without a GPU, and what they use of it."""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CAPABILITIES = [80, 90, 100, 120]


class Resources(NamedTuple):
    """Of one thread; stack: bytes, where spilled registers go. widest_*: bytes of its largest loads and stores.

    shared: bytes of shared memory of a program.
    """

    registers: int
    stack: int
    widest_load: int
    widest_store: int
    shared: int


def compiled_for(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int, unaligned: tuple[str, ...] = ()
) -> Any:
    """What Triton makes of `kernel`; the arguments are those of `compile_kernel`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*") and name not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int, folder: Path, unaligned: tuple[str, ...] = ()
) -> Resources:
    """Compile `kernel`. arguments: a Triton type ("*bf16", "i32") for each run-time one, a value for each constant."""
    import triton

    compiled = compiled_for(kernel, arguments, capability, warps, unaligned)
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("triton comes without cuobjdump")
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    widest = _widest("ld", compiled), _widest("st", compiled)
    return Resources(int(found[1]), int(found[2]), *widest, compiled.metadata.shared)


def assembler_report(compiled: Any, architecture: str, folder: Path) -> str:
    """What ptxas says when it assembles what Triton made."""
    import triton

    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [tool, "-v", f"--gpu-name={architecture}", source, "-o", folder / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _widest(instruction: str, compiled: Any) -> int:
    """Bytes of the widest access to global memory in the PTX."""
    accesses = re.findall(rf"{instruction}\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)", compiled.asm["ptx"])
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in accesses), default=0)
