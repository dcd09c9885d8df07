"""The watching stage on a CPU, limited by memory bandwidth; see `fastguard.stages.watch`.

Small tensors are gathered into vectors that stay in a level-2 cache, since a call per tensor takes
longer than reading it. One thread sums vectors in the cache; torch sums large tensors with all its
threads.

Time of the checksum per pass of `measure` [EPYC, one thread]: 0.8 for 24 large float32 tensors,
which is the speed of memory, and 0.7 for 1000 tensors of 4000 elements (4.0 with one call of torch
per tensor). bfloat16: 0.4, with numpy; torch takes 2.6, since it converts before it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.buckets import GradBucket
from fastguard.gradients.cpu_threads import FEW
from fastguard.gradients.memory_order import flat
from fastguard.stages.cpu.vectors import gathered
from fastguard.stages.reference_watch import ZEROS

CACHED = 2**17  # elements that are read at a time: 512 kB of float32, half of a level-2 cache
LONG = 2**27  # elements of a tensor that is read only once


def read_bits(bucket: GradBucket, n_segments: int, nonzero: bool, checksum: bool) -> Tensor:
    """Reads the bit patterns: see `fastguard.stages.reference_watch.read_bits`."""
    found = np.zeros(n_segments + 1, np.int64)
    tensors, sizes = bucket.grads, bucket.sizes
    if not nonzero and bucket.runs is not None:  # the gaps in a run are zero
        tensors, sizes = [run.flat for run in bucket.runs], None
    if sizes is None:
        sizes = list(map(Tensor.numel, tensors))
    limit = CACHED if nonzero else LONG
    total = 0
    for values, start, stop in gathered(tensors, limit, sizes, joined=CACHED):
        values = values.detach().resolve_neg()
        if nonzero:
            segments = list(bucket.segment_ids[start:stop])
            np.add.at(found, segments, _nonzero(values, sizes[start:stop]))
        if checksum:
            total += _sum_of_bits(values)
    found[n_segments] = total
    return torch.from_numpy(found)


def _sum_of_bits(values: Tensor) -> int:
    """Returns the checksum of a vector."""
    bits = values.contiguous().view(torch.int16 if values.itemsize == 2 else torch.int32)
    if bits.dtype is torch.int32 and bits.numel() >= FEW:
        return int(bits.sum(dtype=torch.int32))
    return int(np.add.reduce(bits.numpy(), dtype=np.int32))


def _nonzero(values: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """Returns the number of nonzero elements of each tensor in a vector, int64 `(n,)`.

    Args:
        values: The elements of tensors with these sizes, or a piece of a single tensor.
        sizes: The number of elements of each tensor.
    """
    if values.itemsize == 2:  # numpy has no bfloat16, and is slow with float16
        bits = values.view(torch.int16).numpy()
        zeros = bits + bits == 0  # also for -0, whose only bit is shifted out
    else:
        zeros = values.numpy() == 0
    if len(sizes) == 1:
        return np.array([len(zeros) - np.count_nonzero(zeros)])
    before = np.flatnonzero(zeros).searchsorted(list(accumulate(sizes)))
    return np.array(sizes) - np.diff(before, prepend=0)


def count_exponents(bucket: GradBucket, stride: int, inv_scale: Tensor | None = None) -> Tensor:
    """Counts exponents: see `fastguard.stages.reference_watch.count_exponents`."""
    vectors = [_array(flat(g)) for g in bucket.grads if g.numel()]
    if not vectors:
        return torch.zeros(ZEROS + 1, dtype=torch.int64, device="cpu")
    taken = np.concatenate([v[stride // 2 % len(v) :: stride] for v in vectors])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if bucket.dtype is torch.bfloat16:  # the upper half of a float32
            sample = (taken.astype(np.int32) << 16).view(np.float32)
        else:
            sample = taken.astype(np.float32, copy=False)
        if inv_scale is not None:
            sample = sample * np.float32(inv_scale.item())
    places = sample.view(np.int32) >> 23 & 0xFF
    places[sample == 0] = ZEROS
    return torch.from_numpy(np.bincount(places, minlength=ZEROS + 1))


def _array(vector: Tensor) -> np.ndarray:
    if vector.dtype is torch.bfloat16:
        vector = vector.resolve_neg().view(torch.int16)
    return vector.numpy(force=True)
