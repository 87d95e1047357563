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
    logits_groups,
    grads_groups,
    ignore_index,
    z_loss,
    WITH_GRAD: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r: losses[r] = lse - logits[r, target] + z_loss·lse², and its gradient into grads[r].

    Rows are fp32, grads of the dtype of the products; both may be the same memory when that is fp32, too. The rows have
    `groups` times GROUP elements, `logits_groups` and `grads_groups` from one to the next: the compiler is to know that
    it may read groups. EXACT: none of them is behind the vocabulary, where the gradient is 0. A row whose target is
    ignored is not read: loss and gradient are 0.

    The first KEPT elements, no more than there are, stay in registers; the others are read twice, BLOCK at a time.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary passes 2^31
    target = tl.load(targets + row)
    logits += row * logits_groups * GROUP
    grads += row * grads_groups * GROUP
    columns = groups * GROUP
    first, lanes = tl.arange(0, KEPT), tl.arange(0, BLOCK)
    if target != ignore_index:
        within = (target >= 0) & (target < vocabulary)
        picked = tl.load(logits + target, mask=within, other=float("nan"))
        kept = tl.load(logits + first, eviction_policy="evict_first")
        # A maximum and a sum in each lane, so that the block is reduced once and not in each step.
        largest = tl.full((BLOCK,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(KEPT, columns, BLOCK):
            here = start + lanes
            x = tl.load(logits + here, mask=here < columns, other=float("-inf"), eviction_policy="evict_last")
            if not EXACT:
                x = tl.where(here < vocabulary, x, float("-inf"))
            # Of exp(old maximum - new one) and exp(x - new one) one is 1: a single exponential serves both.
            smaller = tl.exp(-tl.abs(x - largest))
            total = tl.where(x > largest, total * smaller + 1.0, total + smaller)
            largest = tl.maximum(largest, x)
        if not EXACT:
            kept = tl.where(first < vocabulary, kept, float("-inf"))
        maximum, of_kept = tl.max(largest, axis=0), tl.max(kept, axis=0)
        kept = tl.exp(kept - of_kept)
        highest = tl.maximum(maximum, of_kept)
        sums = tl.sum(total * tl.exp(largest - highest), axis=0) + tl.sum(kept, axis=0) * tl.exp(of_kept - highest)
        lse = highest + tl.log(sums)
        tl.store(losses + row, lse - picked + z_loss * lse * lse)
        if WITH_GRAD:
            scale = 1.0 + 2.0 * z_loss * lse
            for start in tl.range(KEPT, columns, BLOCK):
                here = start + lanes
                x = tl.load(logits + here, mask=here < columns, other=float("-inf"), eviction_policy="evict_first")
                if not EXACT:
                    x = tl.where(here < vocabulary, x, float("-inf"))
                grad = tl.exp(x - lse) * scale - tl.where(here == target, 1.0, 0.0)
                tl.store(grads + here, grad.to(grads.dtype.element_ty), mask=here < columns)
            grad = kept * (tl.exp(of_kept - lse) * scale) - tl.where(first == target, 1.0, 0.0)
            tl.store(grads + first, grad.to(grads.dtype.element_ty))
    else:
        tl.store(losses + row, 0.0)
        if WITH_GRAD:
            zeros = tl.zeros((BLOCK,), grads.dtype.element_ty)
            for start in tl.range(0, columns, BLOCK):
                here = start + lanes
                tl.store(grads + here, zeros, mask=here < columns)
