"""bfloat16 as bits: the remainder that makes it a float32, and rounding with counter-based noise.

A float32 `x` is split into a bfloat16 and the lower 16 bits of `x`, as int16:

    low  = bits(x) & 0xFFFF
    high = (bits(x) >> 16) + (low >> 15)        rounded half up in magnitude
    x    = ((high - (low >> 15)) << 16) | low   bit for bit

NaN is made 0x7FC00000 first: the NaN of a GPU, 0x7FFFFFFF, would carry into the sign and read 0.

Noise: 32 bits per element, from the hash `lowbias32` of a counter; unsigned 32-bit arithmetic that
wraps around. Stream 0 is for the weight, 1 to 3 are for the states:

    key    = lowbias32(seed ^ lowbias32(step))
    hash   = lowbias32((first + element) * 0x9E3779B9 + key)
    stream 0: hash & 0xFFFF    1: hash >> 16    2, 3: the same two of lowbias32(hash ^ 0x85EBCA6B)
    stored = (bits(x) + stream) >> 16

Hash: Chris Wellons, "Prospecting for Hash Functions", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
SECOND = 0x85EBCA6B
CANONICAL_NAN = 0x7FC00000


def lowbias32(x: Tensor) -> Tensor:
    """A 32-bit hash of int64 tensors that hold numbers in [0, 2**32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_key(seed: Tensor, step: Tensor) -> Tensor:
    """int64: the key of the noise of a step."""
    return lowbias32(seed ^ lowbias32(step & _MASK))


def stream(key: Tensor, first: int, like: Tensor) -> Tensor:
    """int64, of the shape of `like`: 32 bits of noise per element, in its memory order."""
    n = like.numel()
    counters = torch.arange(n, dtype=torch.int64, device=like.device) + first
    hashes = lowbias32((((counters & _MASK) * GOLDEN) + key) & _MASK)
    out = torch.empty_like(like, dtype=torch.int64)  # the strides of a dense tensor
    in_memory_order(out).copy_(hashes)
    return out


def with_noise(noise: Tensor, number: int) -> Tensor:
    """int64, 16 bits: one of the streams of noise."""
    if number >= 2:
        noise = lowbias32(noise ^ SECOND)
    return noise >> 16 if number % 2 else noise & 0xFFFF


def in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor as one vector, a view, in the order in which it lies in memory."""
    if t.is_contiguous():
        return t.view(-1)
    by_stride = sorted(range(t.dim()), key=lambda d: (t.stride(d), t.size(d)), reverse=True)
    return t.permute(by_stride).reshape(-1) if not t.numel() else t.permute(by_stride).view(-1)


def bits_of(x: Tensor) -> Tensor:
    """int32: the bits of float32 numbers, of NaN always the same."""
    return torch.where(x == x, x.view(torch.int32), CANONICAL_NAN)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 and the int16 remainder of float32 numbers."""
    bits = bits_of(x)
    low = bits.to(torch.int16)  # keeps the lower 16 bits
    # Adding 0x8000 carries into the upper half where bit 15 is set.
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, low


def from_remainder(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` has split."""
    upper = high.contiguous().view(torch.int16).view(high.shape).int()
    lower = low.int()  # negative where bit 15 is set: the borrow comes with the sign
    return ((upper << 16) + lower).view(torch.float32)


def narrowed(x: Tensor, noise: Tensor) -> Tensor:
    """float32 rounded to bfloat16 up or down, with the probability of the distance.

    Args:
        x: Finite numbers are rounded; infinities and NaN stay.
        noise: int64, 16 bits per element.
    """
    bits = bits_of(x).long() & _MASK
    upper = ((bits + noise) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16)
