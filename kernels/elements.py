"""The arithmetic of single elements and vectors of gradients, inlined into the kernels.

Why squares are grouped, and how far off that is: see `measure`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def float32_of(x):
    """float32 of narrower elements, exactly. bf16 is the upper half of a float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def widened(x):
    """float64 of gradient elements."""
    if x.dtype == tl.float64:
        return x
    else:
        return float32_of(x).to(tl.float64)


@triton.jit
def powers(x, P: tl.constexpr):
    """|x|^P of float64 values."""
    if P == 2.0:
        y = x * x
    elif P == 1.0:
        y = tl.abs(x)
    else:
        y = tl.exp2(P * tl.log2(tl.abs(x)))  # 0: exp2(-inf) = 0; NaN stays NaN
    return y


@triton.jit
def magnitude_bits(x):
    """Bit patterns of |x|: ordered as the magnitudes are, with Inf and then NaN above them all."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = float32_of(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def vector_powers(x, P: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VEC: tl.constexpr):
    """float64 `(SIZE // VEC,)`: the power sum of each 16-byte vector of a block."""
    if GROUP == 1:
        y = powers(widened(x), P)
        return tl.sum(tl.reshape(y, (SIZE // VEC, VEC)), axis=1)
    else:
        x = float32_of(x)
        y = tl.sum(tl.reshape(x * x, (SIZE // 2, 2)), axis=1)
        if GROUP >= 4:  # level by level, because the order inside a longer tl.sum is Triton's
            y = tl.sum(tl.reshape(y, (SIZE // 4, 2)), axis=1)
        if GROUP >= 8:
            y = tl.sum(tl.reshape(y, (SIZE // 8, 2)), axis=1)
        y = y.to(tl.float64)
        if GROUP < VEC:
            y = tl.sum(tl.reshape(y, (SIZE // VEC, VEC // GROUP)), axis=1)
        return y
