"""The watching stage: reads bit patterns of gradients and weights, without waiting.

    nonzero[s] = |{x in segment s: x != 0}|
    checksum   = sum over all elements of their bits as a signed integer, mod 2**32
    counts[f]  = number of sampled elements whose float32 has the exponent field f; 256: zeros

A 64-bit element counts as two integers of 32 bits. The checksum depends neither on the order of the
elements nor on their distribution over tensors, and a single flipped bit always changes it.

I/O: `read_bits` reads N bytes once for either result or both; `count_exponents` reads every
`stride`-th element. Both write O(S) numbers, and run only in the steps that are watched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBuckets
from fastguard.gradients.transfer import moved
from fastguard.stages import backend
from fastguard.stages.reference_watch import ZEROS

WORD = 0xFFFFFFFF
EXPONENTS = ZEROS + 1
"""Number of counts: one per exponent field of float32, and one for zeros. NaN and Inf have field
255.
"""


def read_bits(buckets: GradBuckets, *, nonzero: bool, checksum: bool) -> tuple[Tensor, Tensor]:
    """Reads the bit patterns of tensors once.

    Args:
        buckets: The tensors.
        nonzero, checksum: Which results are needed; a result that is not needed is undefined.

    Returns:
        The number of nonzero elements of each segment, int64 `(S,)`, and the checksum, int64 `()`
        in `[0, 2**32)`, on `buckets.device`.
    """
    n = buckets.n_measured
    total: Tensor | None = None
    for bucket in buckets.buckets:
        stages = backend.stages(bucket.device, bucket.kind)
        part = moved(stages.read_bits(bucket, n, nonzero, checksum), buckets.device)
        total = part if total is None else total + part
    if total is None:
        total = torch.zeros(n + 1, dtype=torch.int64, device=buckets.device)
    return total[:n], total[n] & WORD


def count_exponents(buckets: GradBuckets, stride: int, inv_scale: Tensor | None = None) -> Tensor:
    """Counts the exponents of a sample of the gradients, as float32.

    Args:
        buckets: The gradients.
        stride: Every `stride`-th element of each tensor is sampled, at least one.
        inv_scale: float `()`: the factor that unscales the gradients; None: 1.

    Returns:
        int64 `(EXPONENTS,)`, on `buckets.device`. Subnormal float32 numbers have field 0.
    """
    total: Tensor | None = None
    for bucket in buckets.buckets:
        stages = backend.stages(bucket.device, bucket.kind)
        scale = None if inv_scale is None else moved(inv_scale, bucket.device)
        part = moved(stages.count_exponents(bucket, stride, scale), buckets.device)
        total = part if total is None else total + part
    if total is None:
        total = torch.zeros(EXPONENTS, dtype=torch.int64, device=buckets.device)
    return total
