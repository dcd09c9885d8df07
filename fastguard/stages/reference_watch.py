"""The watching stage in plain PyTorch, one tensor at a time; see `fastguard.stages.watch`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.vectors import flat

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ZEROS = 256  # index of the number of zeros, after the exponent fields


def read_bits(bucket: GradBucket, n_segments: int, nonzero: bool, checksum: bool) -> Tensor:
    """Reads the bit patterns of one bucket.

    Args:
        bucket: Tensors of one device and dtype.
        n_segments: S.
        nonzero, checksum: Which results are needed.

    Returns:
        int64 `(S + 1,)`: the number of nonzero elements of each segment, then the checksum, which
        may exceed 2**32. Results that are not needed are undefined.
    """
    found = torch.zeros(n_segments + 1, dtype=torch.int64, device=bucket.device)
    for grad, segment in zip(bucket.grads, bucket.segment_ids, strict=True):
        if nonzero:
            found[segment] += torch.count_nonzero(grad)
        if checksum:
            found[n_segments] += sum_of_bits(grad)
    return found


def sum_of_bits(t: Tensor) -> Tensor:
    """Returns the sum of the bits of each element as a signed integer, int64 `()`.

    Args:
        t: A tensor of any dtype; an element of 64 bits counts as two integers.
    """
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    t = t.resolve_neg()
    bits = t.view(INTEGERS[t.itemsize])
    if t.itemsize == 8:
        bits = torch.stack([bits >> 32, bits << 32 >> 32])
    return bits.sum(dtype=torch.int64)


def count_exponents(bucket: GradBucket, stride: int, inv_scale: Tensor | None = None) -> Tensor:
    """Counts the exponents of a sample of one bucket.

    Args:
        bucket: Gradients of one device and dtype.
        stride: Every `stride`-th element of a tensor is sampled, in the order of memory, beginning
            with element `stride // 2` (modulo the number of elements).
        inv_scale: float `()`: the factor that unscales the gradients; None: 1.

    Returns:
        int64 `(257,)`: see `fastguard.stages.watch.count_exponents`.
    """
    parts = [flat(g)[stride // 2 % g.numel() :: stride] for g in bucket.grads if g.numel()]
    counts = torch.zeros(ZEROS + 1, dtype=torch.int64, device=bucket.device)
    if not parts:
        return counts
    sample = torch.cat(parts).float()  # float64 out of range becomes 0 or Inf
    if inv_scale is not None:
        sample = sample * inv_scale.float()
    fields = sample.view(torch.int32) >> 23 & 0xFF
    places = torch.where(sample == 0, ZEROS, fields).long()
    return counts.index_add_(0, places, torch.ones_like(places))
