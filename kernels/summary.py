"""The last step of measuring: partial sums to one summary a segment, in a fixed order.

    summary[:, s] = power sum, NaN, +Inf, -Inf

I/O: 8 bytes a partial. With one segment the last program of `measure` does this itself; with
several it is a launch of one program a segment."""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.elements import powers
from fastguard.kernels.launch import Launcher

REDUCE_SIZE = 512


@triton.jit
def store_summary(
    total, segment, summary_ptr, segment_counts_ptr, inv_scale_ptr, n_segments,
    P: tl.constexpr, INF_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Column `segment` of the summary: the power sum of the unscaled gradients, and the counts."""
    if HAS_SCALE:
        inv = tl.load(inv_scale_ptr).to(tl.float64)
        if INF_NORM:
            total *= inv
        else:
            total *= powers(inv, P)
    tl.store(summary_ptr + segment, total)
    for kind in tl.static_range(3):
        # .cg: from L2, where the atomics of the other programs went
        n = tl.load(segment_counts_ptr + kind * n_segments + segment, cache_modifier=".cg")
        tl.store(summary_ptr + (kind + 1) * n_segments + segment, n.to(tl.float64))


@triton.jit
def sum_of_partials(partials_ptr, start, end, INF_NORM: tl.constexpr, REDUCE_SIZE: tl.constexpr):
    """The sum (maximum) of partials [start, end), in an order that depends on nothing else."""
    offsets = tl.arange(0, REDUCE_SIZE)
    acc = tl.zeros((REDUCE_SIZE,), dtype=tl.float64)
    i = start
    while i < end:
        # .cg: from L2, where the other programs wrote
        part = tl.load(
            partials_ptr + i + offsets, mask=i + offsets < end, other=0.0, cache_modifier=".cg"
        )
        if INF_NORM:
            acc = tl.maximum(acc, part)
        else:
            acc += part
        i += REDUCE_SIZE
    if INF_NORM:
        total = tl.max(acc, axis=0)
    else:
        total = tl.sum(acc, axis=0)
    return total


@triton.jit(
    do_not_specialize=[
        "segment_starts_ptr", "partials_ptr", "summary_ptr", "segment_counts_ptr",
        "inv_scale_ptr", "n_segments",
    ]
)  # fmt: skip
def segments_kernel(
    segment_starts_ptr,  # int64 (n_segments + 1,): chunks are sorted by segment
    partials_ptr,
    summary_ptr,
    segment_counts_ptr,
    inv_scale_ptr,
    n_segments,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    REDUCE_SIZE: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(segment_starts_ptr + segment)
    end = tl.load(segment_starts_ptr + segment + 1)
    total = sum_of_partials(partials_ptr, start, end, INF_NORM, REDUCE_SIZE)
    store_summary(
        total, segment, summary_ptr, segment_counts_ptr, inv_scale_ptr, n_segments,
        P, INF_NORM, HAS_SCALE,
    )  # fmt: skip


reduce_segments = Launcher(segments_kernel, num_warps=8)
