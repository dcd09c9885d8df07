"""How `update` keeps its float32 results in fewer bits: see `fastguard.optim.bits`.

Nearest even by the hardware; up or down by a counter-based hash (lowbias32); or split into a
bfloat16 and a 16-bit remainder, which together are the float32 bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)
SECOND = tl.constexpr(0x85EBCA6B)
CANONICAL_NAN = tl.constexpr(0x7FC00000)  # a GPU's, 0x7FFFFFFF, would carry into the sign


@triton.jit
def lowbias32(x):
    """A 32-bit hash of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_at(first_counter, at, key):
    """uint32: the noise of the elements `at` of a chunk; arithmetic that wraps around."""
    return lowbias32((first_counter + at.to(tl.uint32)) * GOLDEN + key)


@triton.jit
def bits_of(x):
    """uint32: the bits of float32, of NaN always the same."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, bits, tl.full(bits.shape, CANONICAL_NAN, tl.uint32))


@triton.jit
def upper_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stored(
    x, noise, DTYPE: tl.constexpr, STREAM: tl.constexpr, STOCHASTIC: tl.constexpr,
    EXACT_BF16: tl.constexpr,
):  # fmt: skip
    """A result as it is kept. Only bfloat16 is rounded with noise."""
    if DTYPE == tl.bfloat16:
        if STOCHASTIC:
            if STREAM >= 2:
                noise = lowbias32(noise ^ SECOND)
            if STREAM % 2 == 1:
                noise = noise >> 16
            return upper_half(bits_of(x) + (noise & 0xFFFF))
        elif EXACT_BF16:
            bits = bits_of(x)
            return upper_half(bits + (((bits >> 16) & 1) + 0x7FFF))
        else:
            return x.to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def weight_of_parts(upper, lower):
    """float32 of a bfloat16 and its remainder."""
    upper = upper.to(tl.int16, bitcast=True).to(tl.int32)
    # Negative where bit 15 is set: the borrow comes with the sign.
    return ((upper << 16) + lower.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def weight_and_remainder(x):
    """The bfloat16, rounded half up in magnitude, and the int16 that make up a float32."""
    bits = bits_of(x)
    lower = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return upper_half(bits + 0x8000), lower
