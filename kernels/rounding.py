"""Stores the float32 results of `update` in fewer bits; see `fastguard.optim.bits`.

There are three ways: round to nearest even, in hardware; round stochastically, with noise from a
counter-based hash (lowbias32); or split a float32 into a bfloat16 and a 16-bit remainder, which
together restore it bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)
SECOND = tl.constexpr(0x85EBCA6B)
SMALLEST_HALF = tl.constexpr(2.0**-14)  # the smallest normal float16
ROUNDS_TO_INF = tl.constexpr(65520.0)  # the smallest number that float16 rounds to infinity
LARGEST_HALF = tl.constexpr(65504.0)
# rounding a GPU's NaN, 0x7FFFFFFF, would carry into the sign
CANONICAL_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def lowbias32(x):
    """Computes 32-bit hashes of uint32 numbers."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_at(first_counter, at, key):
    """Returns the noise of the elements `at` of a chunk, uint32, in wrapping arithmetic."""
    return lowbias32((first_counter + at.to(tl.uint32)) * GOLDEN + key)


@triton.jit
def bits_of(x):
    """Returns the bits of float32 as uint32, with a single bit pattern for NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, bits, tl.full(bits.shape, CANONICAL_NAN, tl.uint32))


@triton.jit
def upper_half(bits):
    """Returns the upper 16 bits as bfloat16."""
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrowed_to_half(x, noise):
    """Rounds float32 stochastically to float16, with 16 bits of noise as uint32."""
    size = tl.abs(x)
    bits = size.to(tl.uint32, bitcast=True) + (noise >> 3)
    normal = ((bits >> 13) << 13).to(tl.float32, bitcast=True)
    normal = tl.where(normal > LARGEST_HALF, LARGEST_HALF, normal)
    normal = tl.where(size < ROUNDS_TO_INF, normal, size)  # NaN and infinity are kept
    is_small = size < SMALLEST_HALF
    units = (tl.where(is_small, size, 0.0) * 1099511627776.0).to(tl.uint32) + noise
    small = (units >> 16).to(tl.float32) * 5.9604644775390625e-08
    rounded = tl.where(is_small, small, normal)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    signed = (rounded.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(x == x, signed, x).to(tl.float16)


@triton.jit
def noise_of_stream(noise, STREAM: tl.constexpr):
    """Returns the 16 bits of noise of a stream: 0 for the weight, then one per state."""
    if STREAM >= 2:
        noise = lowbias32(noise ^ SECOND)
    if STREAM % 2 == 1:
        noise = noise >> 16
    return noise & 0xFFFF


@triton.jit
def stored(
    x, noise, DTYPE: tl.constexpr, STREAM: tl.constexpr, STOCHASTIC: tl.constexpr,
    EXACT_BF16: tl.constexpr,
):  # fmt: skip
    """Rounds a result to its stored dtype; only 16-bit dtypes are rounded stochastically."""
    if DTYPE == tl.bfloat16:
        if STOCHASTIC:
            return upper_half(bits_of(x) + noise_of_stream(noise, STREAM))
        elif EXACT_BF16:
            bits = bits_of(x)
            return upper_half(bits + (((bits >> 16) & 1) + 0x7FFF))
        else:
            return x.to(tl.bfloat16)
    elif DTYPE == tl.float16:
        if STOCHASTIC:
            return narrowed_to_half(x.to(tl.float32), noise_of_stream(noise, STREAM))
        else:
            return x.to(tl.float16)
    else:
        return x.to(DTYPE)


@triton.jit
def weight_of_parts(upper, lower):
    """Restores the float32 from a bfloat16 and its remainder."""
    upper = upper.to(tl.int16, bitcast=True).to(tl.int32)
    # The remainder is negative if bit 15 is set, so adding it borrows from the upper half.
    return ((upper << 16) + lower.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def weight_and_remainder(x):
    """Splits a float32 into a bfloat16, rounded half up in magnitude, and an int16."""
    bits = bits_of(x)
    lower = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return upper_half(bits + 0x8000), lower
