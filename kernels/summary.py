"""The summary: reduces partial sums to one column per segment, in a fixed order.

    summary[:, s] = power sum, NaN, +Inf, -Inf

If power sums could overflow or underflow float64 (ROOTED), partials and sums are norms instead,
which are divided by the largest norm before they are added.

    scratch   int64: ticket (1,), counts of segments (3, S), counts of tensors (3, T)
    partials  float64 (P,)

The scratch is zero between two launches (see `scratch`): counts are moved out of the scratch.

I/O: 8 bytes per partial. With one segment, the last program of `measure` writes the column itself;
with several, a second launch has one program per segment. `decide` reads the summary.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.elements import powers, root, unit_of
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.scratch import Scratch

REDUCE_SIZE = 512


def n_zeros(n_segments: int, n_tensors: int) -> int:
    """Returns the number of elements of the scratch."""
    return 1 + 3 * (n_segments + n_tensors)


@triton.jit
def places(scratch_ptr, n_segments, n_tensors):
    """Returns pointers to the counts of the tensors, the counts of the segments, and the ticket."""
    segment_counts_ptr = scratch_ptr + 1
    return segment_counts_ptr + 3 * n_segments, segment_counts_ptr, scratch_ptr


@triton.jit
def zero_counts(counts_ptr, n_tensors, SIZE: tl.constexpr):
    """Sets the counts of the tensors to zero; all programs share the work."""
    i = tl.program_id(0) * SIZE
    while i < 3 * n_tensors:
        at = i + tl.arange(0, SIZE)
        tl.store(counts_ptr + at, tl.zeros((SIZE,), dtype=tl.int64), mask=at < 3 * n_tensors)
        i += tl.num_programs(0) * SIZE


@triton.jit
def move_counts(scratch_ptr, counts_ptr, begin, end, SIZE: tl.constexpr):
    """Moves counts [begin, end) out of the scratch, and zeroes them there."""
    i = begin
    while i < end:
        at = i + tl.arange(0, SIZE)
        # .cg reads from L2, where the other programs' atomics were performed
        n = tl.load(scratch_ptr + at, mask=at < end, other=0, cache_modifier=".cg")
        tl.store(counts_ptr + at, n, mask=at < end)
        tl.store(scratch_ptr + at, tl.zeros((SIZE,), dtype=tl.int64), mask=at < end)
        i += SIZE


@triton.jit
def store_summary(
    total, segment, summary_ptr, segment_counts_ptr, inv_scale_ptr, n_segments,
    P: tl.constexpr, INF_NORM: tl.constexpr, ROOTED: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Writes column `segment` of the summary, and resets the counts of the segment.

    The column contains the power sum of the unscaled gradients and the counts.

    Returns:
        The number of non-finite elements.
    """
    if HAS_SCALE:
        inv = tl.load(inv_scale_ptr).to(tl.float64)
        if INF_NORM or ROOTED:
            total *= inv
        else:
            total *= powers(inv, P)
    tl.store(summary_ptr + segment, total)
    n_bad = tl.full((), 0.0, tl.float64)
    for kind in tl.static_range(3):
        # .cg reads from L2, where the other programs' atomics were performed
        n = tl.load(segment_counts_ptr + kind * n_segments + segment, cache_modifier=".cg")
        tl.store(summary_ptr + (kind + 1) * n_segments + segment, n.to(tl.float64))
        n_bad += n.to(tl.float64)
    tl.debug_barrier()  # all threads must have read the counts before any thread resets them
    if n_bad > 0.0:
        for kind in tl.static_range(3):
            tl.store(segment_counts_ptr + kind * n_segments + segment, 0)
    return n_bad


@triton.jit
def whole_model(
    summary_ptr,
    n_segments,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Returns the power sum (norm, if ROOTED) of the model, and its numbers of NaN and of Inf."""
    lanes = tl.arange(0, BLOCK_SIZE)
    unit = tl.full((), 1.0, tl.float64)
    if ROOTED:
        largest = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
        i = 0
        while i < n_segments:
            mask = i + lanes < n_segments
            norm = tl.load(summary_ptr + i + lanes, mask=mask, other=0.0)
            largest = tl.maximum(largest, norm)
            i += BLOCK_SIZE
        unit = unit_of(tl.max(largest, axis=0))
    sums = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    nans = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    infinite = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    i = 0
    while i < n_segments:
        mask = i + lanes < n_segments
        power_sum = tl.load(summary_ptr + i + lanes, mask=mask, other=0.0)
        if INF_NORM:
            sums = tl.where((power_sum > sums) | (power_sum != power_sum), power_sum, sums)
        elif ROOTED:
            sums += powers(power_sum / unit, P)
        else:
            sums += power_sum
        nans += tl.load(summary_ptr + n_segments + i + lanes, mask=mask, other=0.0)
        for kind in tl.static_range(2, 4):
            infinite += tl.load(summary_ptr + kind * n_segments + i + lanes, mask=mask, other=0.0)
        i += BLOCK_SIZE
    if INF_NORM:
        total = tl.max(sums, axis=0)
    else:
        total = tl.sum(sums, axis=0)
    if ROOTED:
        total = root(total, P, INF_NORM) * unit
    return total, tl.sum(nans, axis=0), tl.sum(infinite, axis=0)


@triton.jit
def sum_of_partials(
    partials_ptr,
    start,
    end,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,
    REDUCE_SIZE: tl.constexpr,
):
    """Returns the sum (maximum, norm) of partials [start, end), in a fixed order."""
    offsets = tl.arange(0, REDUCE_SIZE)
    unit = tl.full((), 1.0, tl.float64)
    if ROOTED:
        largest = tl.zeros((REDUCE_SIZE,), dtype=tl.float64)
        i = start
        while i < end:
            part = tl.load(
                partials_ptr + i + offsets, mask=i + offsets < end, other=0.0, cache_modifier=".cg"
            )
            largest = tl.maximum(largest, part)
            i += REDUCE_SIZE
        unit = unit_of(tl.max(largest, axis=0))
    acc = tl.zeros((REDUCE_SIZE,), dtype=tl.float64)
    i = start
    while i < end:
        # .cg reads from L2, where the other programs wrote
        part = tl.load(
            partials_ptr + i + offsets, mask=i + offsets < end, other=0.0, cache_modifier=".cg"
        )
        if INF_NORM:
            acc = tl.maximum(acc, part)
        elif ROOTED:
            acc += powers(part / unit, P)
        else:
            acc += part
        i += REDUCE_SIZE
    if INF_NORM:
        total = tl.max(acc, axis=0)
    else:
        total = tl.sum(acc, axis=0)
    if ROOTED:
        total = root(total, P, INF_NORM) * unit
    return total


@triton.jit(
    do_not_specialize=[
        "segment_starts_ptr", "scratch_ptr", "partials_ptr", "counts_ptr", "summary_ptr",
        "inv_scale_ptr", "n_segments", "n_tensors",
    ]
)  # fmt: skip
def segments_kernel(
    segment_starts_ptr,  # int64 (n_segments + 1,): chunks are sorted by segment
    scratch_ptr,  # int64, see above
    partials_ptr,  # float64 (n_chunks,)
    counts_ptr,  # int64 (3, n_tensors), written
    summary_ptr,  # float64 (4, n_segments)
    inv_scale_ptr,
    n_segments,
    n_tensors,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    REDUCE_SIZE: tl.constexpr,
):
    """Writes the summary of one segment per program, and a share of the counts of the tensors."""
    tensor_counts_ptr, segment_counts_ptr, _ = places(scratch_ptr, n_segments, n_tensors)
    segment = tl.program_id(0)
    share = (3 * n_tensors + n_segments - 1) // n_segments
    begin = segment * share
    until = tl.minimum(begin + share, 3 * n_tensors)
    move_counts(tensor_counts_ptr, counts_ptr, begin, until, REDUCE_SIZE)
    start = tl.load(segment_starts_ptr + segment)
    end = tl.load(segment_starts_ptr + segment + 1)
    total = sum_of_partials(partials_ptr, start, end, P, INF_NORM, ROOTED, REDUCE_SIZE)
    store_summary(
        total, segment, summary_ptr, segment_counts_ptr, inv_scale_ptr, n_segments,
        P, INF_NORM, ROOTED, HAS_SCALE,
    )  # fmt: skip


_reduce = Launcher(segments_kernel, num_warps=8)


def reduce_segments(
    starts: Tensor,
    scratch: Scratch,
    counts: Tensor,
    summary: Tensor,
    scale: Tensor,
    norm_type: float,
    rooted: bool,
    scale_dtype: torch.dtype | None,
) -> None:
    """Computes the summary of each segment from its partials.

    Args:
        starts: int64 `(S + 1,)`: first chunk of each segment.
        scratch: The scratch, as measure left it.
        counts: int64 `(3, T)`, written.
        summary: float64 `(4, S)`, written.
        scale: `()`: the inverse loss scale; ignored if `scale_dtype` is None.
        norm_type: p.
        rooted: Whether partials are norms.
        scale_dtype: Dtype of `scale`; None: no scale.
    """
    n_segments = summary.shape[1]
    launch = _variant(summary.device, norm_type, rooted, scale_dtype)
    tensors = (starts, scratch.zeros, scratch.partials, counts, summary, scale)
    launch(n_segments, tensors, n_segments, counts.shape[1])


@functools.lru_cache(maxsize=256)
def _variant(
    device: torch.device, norm_type: float, rooted: bool, scale_dtype: torch.dtype | None
) -> Variant:
    return _reduce.variant(
        device,
        P=norm_type,
        INF_NORM=norm_type == math.inf,
        ROOTED=rooted,
        HAS_SCALE=scale_dtype is not None,
        REDUCE_SIZE=REDUCE_SIZE,
    )
