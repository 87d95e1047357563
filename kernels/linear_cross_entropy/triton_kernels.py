"""The softmax of a chunk of logits, row by row: loss of each token, and the gradient of its logits."""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # finite, as the difference of two infinities is not a number


@triton.jit
def cross_entropy_rows(
    logits,
    grads,
    targets,
    losses,
    vocabulary,
    groups,
    logits_stride,
    grads_stride,
    ignore_index,
    z_loss,
    WITH_GRAD: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program r: losses[r] = lse - logits[r, target] + z_loss·lse², and its gradient into grads[r].

    Rows are fp32, grads of the dtype of the products; both may be the same memory when that is fp32, too. The rows have
    `groups` times GROUP elements, known to the compiler to be read in groups; EXACT: none of them is behind the
    vocabulary, where the gradient is 0. A row whose target is ignored is not read: loss and gradient are 0. STAGES
    blocks are on their way from memory at once.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary passes 2^31
    target = tl.load(targets + row)
    logits += row * logits_stride
    grads += row * grads_stride
    columns = groups * GROUP
    lanes = tl.arange(0, BLOCK)
    if target != ignore_index:
        # A maximum and a sum in each lane, so that the block is reduced once and not in each step.
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
            here = start + lanes
            x = tl.load(logits + here, mask=here < columns, other=float("-inf"))
            if not EXACT:
                x = tl.where(here < vocabulary, x, float("-inf"))
            # Of exp(old maximum - new one) and exp(x - new one) one is 1: a single exponential serves both.
            smaller = tl.exp(-tl.abs(x - largest))
            total = tl.where(x > largest, total * smaller + 1.0, total + smaller)
            largest = tl.maximum(largest, x)
        maximum = tl.max(largest, axis=0)
        lse = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum), axis=0))
        within = (target >= 0) & (target < vocabulary)
        picked = tl.load(logits + target, mask=within, other=float("nan"))
        tl.store(losses + row, lse - picked + z_loss * lse * lse)
        if WITH_GRAD:
            scale = 1.0 + 2.0 * z_loss * lse
            for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
                here = start + lanes
                x = tl.load(logits + here, mask=here < columns, other=float("-inf"))
                if not EXACT:
                    x = tl.where(here < vocabulary, x, float("-inf"))
                grad = tl.exp(x - lse) * scale - tl.where(here == target, 1.0, 0.0)
                tl.store(grads + here, grad.to(grads.dtype.element_ty), mask=here < columns)
    else:
        tl.store(losses + row, 0.0)
        if WITH_GRAD:
            zeros = tl.zeros((BLOCK,), grads.dtype.element_ty)
            for start in tl.range(0, columns, BLOCK):
                here = start + lanes
                tl.store(grads + here, zeros, mask=here < columns)
