"""The second half of deterministic sums in Triton: a kernel leaves the parts of a sum, this one adds them in order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ROWS = 128  # few programs, so many loads at once of each
COLUMNS = 16


@triton.jit
def sum_rows(parts, kind, column, is_column, rows, columns, KINDS: tl.constexpr, ROWS: tl.constexpr):
    """The sum over rows of parts (row, kind, column), fp32, for a block of columns of a kind."""
    row = tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros([ROWS, column.shape[0]], tl.float32)
    for first in range(0, rows, ROWS):
        at = ((first + row) * KINDS + kind) * columns
        total += tl.load(parts + at[:, None] + column, mask=((first + row) < rows)[:, None] & is_column, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["rows", "columns"])
def sum_parts(parts, sums, last, rows, columns, KINDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (column, kind) = sum over rows of parts (row, kind, column), fp32; where `last` is given, the last kind's.

    Programs: (columns / COLUMNS rounded up, KINDS).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kind = tl.program_id(1)
    is_column = column < columns
    value = sum_rows(parts, kind, column, is_column, rows, columns, KINDS, ROWS)
    if last is None:
        tl.store(sums + column * KINDS + kind, value.to(sums.dtype.element_ty), mask=is_column)
    else:
        target = sums + column * (KINDS - 1) + kind
        tl.store(target, value.to(sums.dtype.element_ty), mask=is_column & (kind < KINDS - 1))
        tl.store(last + column, value.to(last.dtype.element_ty), mask=is_column & (kind == KINDS - 1))


@triton.jit(do_not_specialize=["rows", "columns"])
def sum_parts_early(parts, sums, last, rows, columns, KINDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`sum_parts`, launched before the kernel that leaves the parts has ended."""
    gdc_wait()
    gdc_launch_dependents()
    sum_parts(parts, sums, last, rows, columns, KINDS, ROWS, COLUMNS)
