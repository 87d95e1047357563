"""AdamW in Triton: one launch for all tensors of a model. `launch.py` launches it."""

import triton
import triton.language as tl

# Columns of the table that has a row of int64 for each tensor: addresses, and the number of elements in units of ALIGN.
WEIGHT, GRADIENT, FIRST, SECOND, STEP, COPY, SIZE = (tl.constexpr(column) for column in range(7))
COLUMNS = tl.constexpr(8)  # a row is 64 bytes


@triton.jit
def _tensor(row, column, ALIGN: tl.constexpr):
    """The fp32 tensor whose address stands in a row of the table."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(tl.float32)), 4 * ALIGN)


@triton.jit
def adamw_kernel(table, blocks, decays, constants, lr, divisor, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One step for BLOCK elements of one tensor, in place, and their copy in bf16 where the tensor has one.

    blocks: (program, 2) int32, the tensor and which of its blocks. constants: fp64, β1, β2, their binary logarithms
    and ε. lr, divisor (of the gradient): fp32 scalars. A tensor's step is the number of this one, counted from 1.
    """
    program = tl.program_id(0)
    tensor = tl.load(blocks + 2 * program)
    row = table + tensor * COLUMNS
    gradient = _tensor(row, GRADIENT, ALIGN)
    weight, first, second = _tensor(row, WEIGHT, ALIGN), _tensor(row, FIRST, ALIGN), _tensor(row, SECOND, ALIGN)
    at = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < tl.load(row + SIZE) * ALIGN
    g = tl.load(gradient + at, mask=is_inside, other=0.0)
    m = tl.load(first + at, mask=is_inside, other=0.0)
    v = tl.load(second + at, mask=is_inside, other=0.0)
    w = tl.load(weight + at, mask=is_inside, other=0.0)

    beta1, beta2 = tl.load(constants), tl.load(constants + 1)
    step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    unbias1 = (1.0 - tl.exp2(step * tl.load(constants + 2))).to(tl.float32)
    unbias2 = (1.0 - tl.exp2(step * tl.load(constants + 3))).to(tl.float32)
    rate = tl.load(lr)

    g = g / tl.load(divisor)
    m = beta1.to(tl.float32) * m + (1.0 - beta1).to(tl.float32) * g
    v = beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * g * g
    scale = tl.sqrt_rn(v) / tl.sqrt_rn(unbias2) + tl.load(constants + 4).to(tl.float32)
    w = w - rate * tl.load(decays + tensor) * w - rate / unbias1 * m / scale

    tl.store(first + at, m, mask=is_inside)
    tl.store(second + at, v, mask=is_inside)
    tl.store(weight + at, w, mask=is_inside)
    copy = tl.load(row + COPY)
    if copy != 0:
        target = tl.multiple_of(copy.to(tl.pointer_type(tl.bfloat16)), 2 * ALIGN)
        tl.store(target + at, w.to(tl.bfloat16), mask=is_inside)
