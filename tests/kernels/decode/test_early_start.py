"""What kernels that start early do before they wait for the kernel before: they read parameters and states.

Anything else may not be written yet, or still be read by others, which a GPU shows only now and then. So the compiled
code is looked at: each access to global memory, by the argument whose address it goes back to.
"""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux on x86-64)")

from kernels.decode import launch
from kernels.decode import triton_kernels as kernels
from tests.kernels.ahead import compiled_for
from tests.kernels.decode.test_compiles import MANY, types

STATES = {"state", "conv_state"}  # last written at the token before, which has ended: its sampling starts no step early
PARAMETERS = {"weight", "norm_weight", "conv_weight", "conv_bias", "dt_weight", "dt_bias", "A_log", "D"}
LAUNCH = launch.LAUNCH
IN_PROJ = {"SIZE": 2048, "PIECE": 2048, "GROUPS": 1, "ROWS": 4, "TILES": 4, "SHIFTED": 1, "outputs": 8192}
OUT_PROJ = {"SIZE": 4096, "PIECE": 4096, "GROUPS": 1, "ROWS": 2, "TILES": 2, "SHIFTED": 16, "outputs": 2048}
SUMS = {"OUTPUTS": 256, "RANK": 128, "SPLITS": 64}


@pytest.mark.parametrize(
    ("kernel", "warps", "sizes"),
    [
        (kernels.linear_kernel, LAUNCH.warps, {**IN_PROJ, "z": None, "conv_state": None, "conv_input": None}),
        (kernels.linear_kernel, LAUNCH.warps, {**OUT_PROJ, "residual": None, "total": None}),
        (kernels.conv_project_kernel, LAUNCH.warps, {**SUMS, "CHANNELS": LAUNCH.project}),
        (kernels.dt_scan_kernel, LAUNCH.warps, {**SUMS, "CHANNELS": LAUNCH.scan, "STATES": 16}),
        (kernels.conv_ssd_kernel, LAUNCH.warps, {"states": 128, "ROWS": LAUNCH.ssd, "STATES": 128}),
        *((kernel, warps, sizes) for kernel, sizes, warps in MANY),
    ],
)
def test_before_the_wait_nothing_else_is_read_and_nothing_is_written(
    kernel: Any, warps: int, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    arguments = types(kernel, **sizes, PDL=True)
    ptx = compiled_for(kernel, arguments, 90, warps).asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == 1
    before, after = accesses(ptx, [name for name in kernel.arg_names if isinstance(arguments[name], str)])
    # The L2 cache, where all writes go, may fetch anything: it is not an old copy of it.
    allowed = {("ld", name) for name in PARAMETERS | STATES}
    assert {(what, name) for what, name in before if what != "prefetch"} <= allowed
    assert "?" not in {name for _, name in before | after}, "an address that comes from no argument"
    assert {"ld", "st"} <= {what for what, _ in after}


def accesses(ptx: str, names: list[str]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """(ld, st or prefetch, argument) before the wait and after it."""
    argument: dict[str, str] = {}  # of an address in a register
    found: tuple[set[tuple[str, str]], set[tuple[str, str]]] = (set(), set())
    waited = False
    for line in ptx.splitlines():
        waited |= "griddepcontrol.wait" in line
        if loaded := re.search(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            argument[loaded[1]] = names[int(loaded[2])]
        elif access := re.search(r"(ld|st|prefetch)(?:\.L2)?\.global[^\[]*\[ ?(%rd\d+)", line):
            found[waited].add((access[1], argument.get(access[2], "?")))
        elif access := re.search(r"cp\.async\.c[ag]\.[^\[]*\[[^\]]*\], \[ ?(%rd\d+)", line):
            found[waited].add(("ld", argument.get(access[1], "?")))
        elif computed := re.search(r"[\w.]+\s+(%rd\d+), (.*);", line):
            sources = [register for register in re.findall(r"%rd\d+", computed[2]) if register in argument]
            if sources:
                argument[computed[1]] = argument[sources[0]]
    return found
