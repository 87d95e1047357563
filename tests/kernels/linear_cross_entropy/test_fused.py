"""The GPU's loss as far as it can be tested without one: interpreted on the CPU, and compiled for each architecture."""

from pathlib import Path

import pytest

from kernels.linear_cross_entropy.fused import CLASS_ALIGNMENT, launch_for
from tests.kernels.ahead import CAPABILITIES, compile_kernel
from tests.kernels.triton_interpreter import run_interpreted


def test_interpreted() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


def test_what_a_row_keeps_in_registers_is_part_of_it() -> None:
    """It is read and written without a mask: behind the row lies the next one."""
    for columns in (*range(CLASS_ALIGNMENT, 2**17, CLASS_ALIGNMENT), 2**18, 2**18 + CLASS_ALIGNMENT):
        launch = launch_for(columns)
        assert launch.kept <= columns
        assert launch.kept.bit_count() == launch.block.bit_count() == 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "with_grad", "columns"),
    [("bf16", True, 50280), ("fp32", True, 50280), ("fp32", False, 50280), ("bf16", True, 256), ("bf16", True, 32000)],
)
def test_compiles_within_its_registers(
    capability: int, dtype: str, with_grad: bool, columns: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs triton to compile")
    from kernels.linear_cross_entropy.triton_kernels import cross_entropy_rows

    launch = launch_for(columns)
    arguments = {
        "logits": "*fp32",
        "grads": f"*{dtype}",
        "targets": "*i64",
        "losses": "*fp32",
        **dict.fromkeys(("vocabulary", "groups", "logits_groups", "grads_groups", "ignore_index"), "i32"),
        "z_loss": "fp32",
        "WITH_GRAD": with_grad,
        "GROUP": CLASS_ALIGNMENT,
        "EXACT": True,
        "KEPT": launch.kept,
        "BLOCK": launch.block,
    }
    used = compile_kernel(cross_entropy_rows, arguments, capability, launch.warps, tmp_path)
    assert used.stack <= 8
    assert used.registers * 32 * launch.warps <= 65536
