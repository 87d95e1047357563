"""Functions that Triton's own versions of spend many instructions on."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on the CPU, where there are no PTX instructions


@triton.jit
def exp2(x):
    """2^x of fp32 values in one instruction; below 1e-38 it is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) of fp32 values in 4 instructions, to some 1e-7 of 1; below 1e-38 it is 0."""
    if INTERPRETED:
        return tl.sigmoid(x)
    power = exp2(x * -1.4426950408889634)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to the last bits of fp32 where it is small, which the logarithm of the GPU is not."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), s at most 1/3: its series
    q = s * s
    series = 1.0 / 15
    series = series * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def clamp(x, low, high):
    """min(max(x, low), high), where NaN stays NaN: the GPU's min and max return the other number."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """x in another dtype; in fp16 nothing becomes infinite, but the largest number there is."""
    if dtype == tl.float16:
        x = clamp(x, -65504.0, 65504.0)
    return x.to(dtype)
