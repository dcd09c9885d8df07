"""Arithmetic on single elements and vectors of gradients, inlined into the kernels.

See `measure` for why squares are grouped, and for the error bounds.
"""

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
    """Converts narrower elements to float32 exactly. bf16 is the upper half of a float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def widened(x):
    """Converts gradient elements to float64."""
    if x.dtype == tl.float64:
        return x
    else:
        return float32_of(x).to(tl.float64)


@triton.jit
def as_arithmetic(x, ARITHMETIC: tl.constexpr):
    """Converts elements to float32 or float64, the dtype of the arithmetic of an update."""
    return float32_of(x).to(ARITHMETIC) if x.dtype != tl.float64 else x


@triton.jit
def array_at(address_ptr, COLUMN: tl.constexpr, first, DTYPE: tl.constexpr):
    """Returns the address of element `first` of an array."""
    return tl.load(address_ptr + COLUMN) + first * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def powers(x, P: tl.constexpr):
    """Computes |x|^P of float64 values."""
    if P == 2.0:
        y = x * x
    elif P == 1.0:
        y = tl.abs(x)
    else:
        y = tl.exp2(P * tl.log2(tl.abs(x)))  # gives 0 for 0, since exp2(-inf) = 0, and NaN for NaN
    return y


@triton.jit
def root(power_sum, P: tl.constexpr, INF_NORM: tl.constexpr):
    """Computes the p-norm from a power sum."""
    if INF_NORM:
        return power_sum
    elif P == 2.0:
        return tl.sqrt(power_sum)
    else:
        return tl.exp2(tl.log2(power_sum) / P)  # gives 0 for 0, since exp2(-inf) = 0


@triton.jit
def unit_of(largest):
    """Returns the divisor of values before they are raised to a power, which prevents overflow."""
    return tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)


@triton.jit
def norm_of_two(a, b, P: tl.constexpr):
    """Computes the norm of a whole from the norms of its two parts."""
    unit = unit_of(tl.maximum(a, b))
    return root(powers(a / unit, P) + powers(b / unit, P), P, False) * unit


@triton.jit
def magnitude_bits(x):
    """Returns the bit patterns of |x|, ordered like the magnitudes, then Inf, then NaN."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = float32_of(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def vector_powers(x, P: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VEC: tl.constexpr):
    """Returns the power sum of each 16-byte vector of a block, float64 `(SIZE // VEC,)`."""
    if GROUP == 1:
        y = powers(widened(x), P)
    else:  # GROUP 2 with 16-bit elements: one addition of two exact squares
        x = float32_of(x)
        y = tl.sum(tl.reshape(x * x, (SIZE // 2, 2)), axis=1).to(tl.float64)
    return tl.sum(tl.reshape(y, (SIZE // VEC, VEC // GROUP)), axis=1)


@triton.jit
def vector_squares(x, SIZE: tl.constexpr, VEC: tl.constexpr):
    """Returns the sum of squares of each 16-byte vector, and its rounding error.

    Both are float32 `(SIZE // VEC,)`. They are infinite or NaN if any element is, or if a square
    overflows float32.
    """
    if x.dtype == tl.float32:
        # The square of the upper 12 bits of the significand is exact, and the remainder is small.
        top = (x.to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)
        y, lost = _added_in_pairs(top * top, (x - top) * (x + top), SIZE)
    else:
        x = float32_of(x)
        y, lost = _two_sum(*tl.split(tl.reshape(x * x, (SIZE // 2, 2))))
    y, lost = _added_in_pairs(y, lost, SIZE // 2)
    if VEC == 8:
        y, lost = _added_in_pairs(y, lost, SIZE // 4)
    return y, lost


@triton.jit
def _added_in_pairs(y, lost, SIZE: tl.constexpr):
    """Adds neighboring values, and adds the rounding errors to the given errors."""
    a, b = tl.split(tl.reshape(lost, (SIZE // 2, 2)))
    y, rounded_off = _two_sum(*tl.split(tl.reshape(y, (SIZE // 2, 2))))
    return y, a + b + rounded_off


@triton.jit
def _two_sum(a, b):
    """Returns `a + b` and the rounding error of the addition (Knuth).

    An argument that is a product is exact, so fusing the product and an addition changes nothing.
    """
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)
