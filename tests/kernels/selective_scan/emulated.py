"""The CUDA sources of the selective scan compiled for the CPU, so that their logic is tested without a GPU.

What is assembly in them is put in plain C++ here, and emulator.h has the rest of CUDA. fp32 only. Threads run from one
barrier to the next in random order, so that one that is missing shows; but blocks run one after another and copies take
no time: other races are a matter of compute-sanitizer (tests/gpu).
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.selective_scan.cuda import compile as sources
from kernels.selective_scan.cuda import device
from kernels.selective_scan.cuda.variants import Variant

BODIES = {
    "float exp2_fast(float x)": "return exp2f(x);",
    "float sigmoid(float x)": "return 1.f / (1.f + exp2f(-x * LOG2E));",
    "void copy_async(void* to": "if (valid) memcpy(to, from, BYTES); else memset(to, 0, BYTES);",
    "void copies_commit()": "",
    "void copies_wait()": "",
    "void left_for(int barrier)": "arrive(named_barriers[barrier], 64);",
    "void wait_for(int barrier)": "await(named_barriers[barrier], 64);",
}
LINES = {
    r"extern __shared__ char memory\[\];": "char* memory = block_memory;",
    r'asm volatile\("ld\.acquire[^\n]*': "item = *entry;",
    r'asm volatile\("st\.release[^\n]*': "*entry = item;",
    r'asm\("mma\.sync(.|\n)*?\)\);': "abort();",
}
FP32 = 0


def compiler() -> str | None:
    return shutil.which("g++")


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, processors: int = 4) -> list[str]:
    """Make `scan.forward` and `scan.backward` take CPU tensors; returns the list of kernels launched from then on."""
    launched: list[str] = []
    built: dict[tuple[object, ...], device.Kernel] = {}

    def kernel(name: str, index: int, variant: Variant, dtype: int, *options: bool) -> device.Kernel:
        assert dtype == FP32
        key = (name, variant, options)
        if key not in built:
            macros = variant.macros(dtype, *options)
            function = build(name, variant.source, macros, folder / f"{len(built)}.so")
            built[key] = device.Kernel(function, macros["SHARED_BYTES"], 2, name)
        return built[key]

    def launch(
        kernel: device.Kernel, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else int(a) for a in arguments]
        kernel.function(blocks, threads, shared_bytes, (ctypes.c_int64 * len(values))(*values))
        launched.append(kernel.code)

    monkeypatch.setattr(device, "kernel", kernel)
    monkeypatch.setattr(device, "launch", launch)
    monkeypatch.setattr(device, "processors", lambda index: processors)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    return launched


def build(name: str, source: str, macros: dict[str, int], library: Path) -> ctypes._NamedFuncPointer:
    """A shared library with the kernel, which is called with blocks, threads, shared bytes and the arguments."""
    text = sources._source(source)
    for head, body in BODIES.items():
        text = with_body(text, head, body) if head in text else text
    for pattern, line in LINES.items():
        text = re.sub(pattern, line, text)
    found = re.search(rf"__global__ void (?:__launch_bounds__\([^)]*\) )?{name}\((.*?)\) \{{", text, re.DOTALL)
    assert found, name
    types = [parameter.strip().rsplit(maxsplit=1)[0] for parameter in found[1].split(",")]
    arguments = ", ".join(f"*reinterpret_cast<{kind}*>(kernel_arguments + {i})" for i, kind in enumerate(types))
    header = '#include "emulator.h"\n' + "".join(f"#define {key} {value}\n" for key, value in macros.items())
    footer = f"""
static void fiber() {{
    {name}({arguments});
    finished[current] = true;
}}
extern "C" void launch(int blocks, int threads, int shared_bytes, long long* arguments) {{
    launch_blocks(fiber, blocks, threads, shared_bytes, arguments);
}}
"""
    cpp = library.with_suffix(".cpp")
    cpp.write_text(header + text + footer)
    command = [compiler() or "g++", "-O1", "-std=c++20", "-w", "-shared", "-fPIC", "-I", str(Path(__file__).parent)]
    result = subprocess.run([*command, "-o", str(library), str(cpp)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:3000]
    return ctypes.CDLL(str(library)).launch


def with_body(text: str, head: str, body: str) -> str:
    """Replace what is in the braces after `head`."""
    start = text.index("{", text.index(head))
    depth, end = 0, start
    while True:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
        if depth == 0:
            return f"{text[:start]}{{ {body} }}{text[end:]}"
