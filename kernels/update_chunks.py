"""Shared by the kernels of an update: rows of the chunk table, and factors of gradients.

Everything is inlined into the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.apply import SMALLEST_FACTOR
from fastguard.kernels.columns import (
    SIGN_COLUMN,
    UPDATE_ALIGNED,
    UPDATE_ELEMENTS,
    UPDATE_FIRST,
    UPDATE_SEGMENT,
    UPDATE_TENSOR,
)

THREADS = 256  # threads per program; each thread processes one vector of each array
SLOW_SIZE = tl.constexpr(256)  # elements per block outside of whole vectors


@triton.jit
def chunk_at(row_ptr, VEC: tl.constexpr):
    """Reads a row of the table.

    Returns the tensor, its first element in the chunk, the number of elements in the chunk, and how
    many of these are in whole aligned vectors.
    """
    tensor = tl.load(row_ptr + UPDATE_TENSOR)
    first = tl.load(row_ptr + UPDATE_FIRST)
    n = tl.load(row_ptr + UPDATE_ELEMENTS).to(tl.int32)
    n_vec = tl.where(tl.load(row_ptr + UPDATE_ALIGNED) > 0, n // VEC * VEC, 0)
    return tensor, first, n, n_vec


@triton.jit
def multiplier_at(row_ptr, multiplier_ptr):
    """Returns the multiplier of a chunk."""
    return tl.load(multiplier_ptr + tl.load(row_ptr + UPDATE_SEGMENT))


@triton.jit
def factors_of(multiplier, coef_ptr, ARITHMETIC: tl.constexpr):
    """Returns two factors whose product is the multiplier of a gradient, with the sign of its step.

    A multiplier that would be subnormal in float32 is split into two factors, to keep its
    precision.
    """
    # the comparison is False for NaN, which makes the result NaN
    tiny = tl.abs(multiplier) < SMALLEST_FACTOR
    scale = tl.where(tiny, SMALLEST_FACTOR, 1.0).to(ARITHMETIC)
    factor = tl.where(tiny, multiplier / SMALLEST_FACTOR, multiplier).to(ARITHMETIC)
    return scale, factor * tl.load(coef_ptr + SIGN_COLUMN).to(ARITHMETIC)


@triton.jit
def scaled(g, clean, scale, factor):
    """Scales gradient elements by both factors; `clean` first sets NaN and Inf to 0."""
    if clean:
        g = tl.where(tl.abs(g) < float("inf"), g, 0.0)  # False for NaN
    return (g * scale) * factor
