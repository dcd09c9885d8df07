"""The watching stage on a CPU, limited by memory bandwidth; see `fastguard.stages.watch`.

Small tensors are gathered into vectors that stay in a level-2 cache, since a call per tensor takes
longer than reading the tensor. numpy sums them on one thread; torch sums large tensors on all its
threads (on a single one it takes 1.2 times as long as numpy).

Time of the checksum per pass of `measure` [EPYC, one thread]: 0.9 for 24 large float32 tensors,
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
from fastguard.gradients.vectors import FEW, buffer, gathered
from fastguard.stages.cpu.l2_blocks import as_arrays
from fastguard.stages.reference_watch import ZEROS

JOINED = 2**17  # elements of small tensors that are concatenated; they fill half of a level-2 cache
PIECE = 2**20  # elements of a large tensor whose zeros are marked at a time
WHOLE = 2**27  # elements of a large tensor at a time, if only the checksum is computed


def read_bits(bucket: GradBucket, n_segments: int, nonzero: bool, checksum: bool) -> Tensor:
    """Reads the bit patterns: see `fastguard.stages.reference_watch.read_bits`."""
    found = np.zeros(n_segments + 1, np.int64)
    tensors, sizes = bucket.grads, bucket.sizes
    # gaps in a run are zero, so they do not change the checksum
    if not nonzero and bucket.runs is not None:
        tensors, sizes = [run.flat for run in bucket.runs], None
    if sizes is None:
        sizes = list(map(Tensor.numel, tensors))
    limit = PIECE if nonzero else WHOLE
    segments = bucket.segment_ids
    total = 0
    for values, start, stop in gathered(tensors, limit, sizes, joined=JOINED):
        values = values.detach().resolve_neg()
        if checksum:
            total += _sum_of_bits(values)
        if nonzero:
            zeros = _zeros(values)
            if stop - start == 1:
                found[segments[start]] += len(zeros) - np.count_nonzero(zeros)
            else:
                own = sizes[start:stop]
                np.add.at(found, list(segments[start:stop]), own - _by_tensor(zeros, own))
    found[n_segments] = total
    return torch.from_numpy(found)


def _sum_of_bits(values: Tensor) -> int:
    """Returns the checksum of a vector."""
    bits = values.contiguous().view(torch.int16 if values.itemsize == 2 else torch.int32)
    if bits.dtype is torch.int32 and bits.numel() >= FEW and torch.get_num_threads() > 1:
        return int(bits.sum(dtype=torch.int32))
    return int(np.add.reduce(bits.numpy(), dtype=np.int32))


def _zeros(values: Tensor) -> np.ndarray:
    """Returns which elements of a vector are zero, bool, valid until the next call."""
    n = values.numel()
    zeros = buffer("zeros", PIECE, (PIECE,), torch.bool)[:n].numpy()
    if values.itemsize > 2:
        return np.equal(values.numpy(), 0, out=zeros)
    bits = values.view(torch.int16).numpy()  # numpy has no bfloat16, and is slow with float16
    twice = buffer("twice", PIECE, (PIECE,), torch.int16)[:n].numpy()
    # -0 has a single bit, which is shifted out.
    return np.equal(np.add(bits, bits, out=twice), 0, out=zeros)


def _by_tensor(zeros: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Returns the number of zeros of each tensor in a vector with tensors of these sizes."""
    before = np.flatnonzero(zeros).searchsorted(list(accumulate(sizes, initial=0)))
    return before[1:] - before[:-1]  # np.diff takes 15 µs


def count_exponents(bucket: GradBucket, stride: int, inv_scale: Tensor | None = None) -> Tensor:
    """Counts exponents: see `fastguard.stages.reference_watch.count_exponents`."""
    # order "K" is the order in memory
    vectors = [array.ravel("K") for array in _arrays(bucket) if array.size]
    if not vectors:
        return torch.zeros(ZEROS + 1, dtype=torch.int64, device="cpu")
    taken = np.concatenate([v[stride // 2 % v.size :: stride] for v in vectors])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if bucket.dtype is torch.bfloat16:  # a bfloat16 is the upper half of a float32
            sample = (taken.astype(np.int32) << 16).view(np.float32)
        else:
            sample = taken.astype(np.float32, copy=False)
        if inv_scale is not None:
            sample = sample * np.float32(inv_scale.item())
    counts = np.bincount(sample.view(np.int32) >> 23 & 0xFF, minlength=ZEROS + 1)
    counts[ZEROS] = len(sample) - np.count_nonzero(sample)
    counts[0] -= counts[ZEROS]
    return torch.from_numpy(counts)


def _arrays(bucket: GradBucket) -> list[np.ndarray]:
    """Returns the tensors as arrays that share their memory; bfloat16 as int16."""
    if bucket.dtype is torch.bfloat16:
        return [g.detach().resolve_neg().view(torch.int16).numpy() for g in bucket.grads]
    return as_arrays(bucket.grads)
