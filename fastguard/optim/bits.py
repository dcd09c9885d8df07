"""Bit operations: a remainder that restores float32 from bfloat16, and stochastic rounding.

A float32 `x` is split into a bfloat16 and the lower 16 bits of `x`, as int16:

    low  = bits(x) & 0xFFFF
    high = (bits(x) >> 16) + (low >> 15)        rounded to nearest, ties away from zero
    x    = ((high - (low >> 15)) << 16) | low   bit for bit

Every NaN is first replaced with 0x7FC00000, because the rounding of a GPU's NaN, 0x7FFFFFFF, would
carry into the sign bit and give 0.

Stochastic rounding adds noise: 32 bits per element, from the hash `lowbias32` of a counter, in
unsigned 32-bit arithmetic that wraps around. Stream 0 is for the weight, 1 to 3 for the states:

    key    = lowbias32(seed ^ lowbias32(step))
    hash   = lowbias32((first + element) * 0x9E3779B9 + key)
    stream 0: hash & 0xFFFF    1: hash >> 16    2, 3: the same two of lowbias32(hash ^ 0x85EBCA6B)
    bfloat16: stored = (bits(x) + stream) >> 16
    float16:  stored = (bits(x) + (stream >> 3)) >> 13 << 13, as a number   for |x| >= 2^-14, else
              stored = (int(|x| * 2^40) + stream) >> 16, times 2^-24        with the sign of x
              A number below 65520 becomes at most 65504, the largest float16.

Hash: Chris Wellons, "Prospecting for Hash Functions", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.gradients.vectors import in_memory_order

_MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
SECOND = 0x85EBCA6B
CANONICAL_NAN = 0x7FC00000


def lowbias32(x: Tensor) -> Tensor:
    """Returns 32-bit hashes of int64 numbers in [0, 2**32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_key(seed: Tensor, step: Tensor) -> Tensor:
    """Returns the noise key of a step, int64."""
    return lowbias32(seed ^ lowbias32(step & _MASK))


def stream(key: Tensor, first: int, like: Tensor) -> Tensor:
    """Returns 32 bits of noise per element of `like`, int64, counted in its memory order."""
    n = like.numel()
    counters = torch.arange(n, dtype=torch.int64, device=like.device) + first
    hashes = lowbias32((((counters & _MASK) * GOLDEN) + key) & _MASK)
    # `empty_like` keeps the strides of a dense tensor
    out = torch.empty_like(like, dtype=torch.int64)
    in_memory_order(out).copy_(hashes)
    return out


def with_noise(noise: Tensor, number: int) -> Tensor:
    """Returns one stream of the noise, int64 with 16 bits per element."""
    if number >= 2:
        noise = lowbias32(noise ^ SECOND)
    return noise >> 16 if number % 2 else noise & 0xFFFF


def bits_of(x: Tensor) -> Tensor:
    """Returns the bits of float32 numbers as int32, with a single bit pattern for NaN."""
    return torch.where(x == x, x.view(torch.int32), CANONICAL_NAN)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 numbers into bfloat16 and an int16 remainder."""
    bits = bits_of(x)
    low = bits.to(torch.int16)  # the conversion keeps the lower 16 bits
    # Adding 0x8000 carries into the upper half if bit 15 is set.
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, low


def from_remainder(high: Tensor, low: Tensor) -> Tensor:
    """Restores the float32 numbers from the two parts that `split` returns."""
    upper = high.contiguous().view(torch.int16).view(high.shape).int()
    lower = low.int()  # negative if bit 15 is set, so that adding it borrows from the upper half
    return ((upper << 16) + lower).view(torch.float32)


def narrowed(x: Tensor, noise: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rounds float32 stochastically to 16 bits.

    Args:
        x: The numbers; infinities and NaN stay as they are.
        noise: int64, 16 bits per element.
        dtype: bfloat16, the default, or float16.
    """
    if dtype is torch.float16:
        return _narrowed_to_half(x, noise)
    bits = bits_of(x).long() & _MASK
    upper = ((bits + noise) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16)


SMALLEST_HALF = 2.0**-14  # the smallest normal float16
ROUNDS_TO_INF = 65520.0  # the smallest number that float16 rounds to infinity
LARGEST_HALF = 65504.0


def _narrowed_to_half(x: Tensor, noise: Tensor) -> Tensor:
    size = x.abs()
    bits = size.view(torch.int32) + (noise >> 3).int()
    normal = ((bits >> 13) << 13).view(torch.float32)
    normal = torch.where(size < ROUNDS_TO_INF, normal.clamp(max=LARGEST_HALF), size)
    is_small = size < SMALLEST_HALF
    units = (torch.where(is_small, size, 0.0) * 2.0**40).int() + noise.int()
    rounded = torch.where(is_small, (units >> 16).float() * 2.0**-24, normal)
    return torch.copysign(torch.where(x == x, rounded, x), x).half()
