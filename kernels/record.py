"""Launch 4, record: packs all device values of a step's record into one float64 row.

I/O: a few numbers of the verdict, and the counts of all tensors if any is bad. There is one
program. In PyTorch, the same work takes 25 operations on single numbers, and thus 25 launches.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels import record_row
from fastguard.kernels.columns import CONSECUTIVE_SKIPS, DECIDED
from fastguard.kernels.launch import OneProgram, Variant

TOTAL_NORM = tl.constexpr(record_row.TOTAL_NORM)
CLIP_COEF = tl.constexpr(record_row.CLIP_COEF)
SKIPPED = tl.constexpr(record_row.SKIPPED)
CLEANED = tl.constexpr(record_row.CLEANED)
REASON = tl.constexpr(record_row.REASON)
STEP = tl.constexpr(record_row.STEP)
IN_A_ROW = tl.constexpr(record_row.CONSECUTIVE_SKIPS)
NAN_COUNT = tl.constexpr(record_row.NAN_COUNT)
POSINF_COUNT = tl.constexpr(record_row.POSINF_COUNT)
NEGINF_COUNT = tl.constexpr(record_row.NEGINF_COUNT)
LR = tl.constexpr(record_row.LR)
N_CULPRITS = tl.constexpr(record_row.N_CULPRITS)
CULPRITS_BEGIN = tl.constexpr(record_row.CULPRITS_BEGIN)
CULPRITS = tl.constexpr(record_row.CULPRITS)
CULPRIT = tl.constexpr(record_row.CULPRIT)
CULPRITS_END = tl.constexpr(record_row.CULPRITS_END)


@triton.jit(
    do_not_specialize=[
        "row_ptr", "summary_ptr", "counts_ptr", "coef_ptr", "found_inf_ptr", "clean_ptr",
        "reason_ptr", "total_norm_ptr", "counters_ptr", "lr_ptr", "losses_ptr", "spikes_ptr",
        "thresholds_ptr", "n_segments", "n_tensors", "n_losses", "n_rules",
    ]
)  # fmt: skip
def record_kernel(
    row_ptr,  # float64, written
    summary_ptr,  # float64 (4, n_segments)
    counts_ptr,  # int64 (3, n_tensors)
    coef_ptr,  # float64 (n_segments,)
    found_inf_ptr,  # float32
    clean_ptr,  # float32
    reason_ptr,  # int64
    total_norm_ptr,  # float64
    counters_ptr,  # int64 (5,)
    lr_ptr,  # float64 (1,)
    losses_ptr,  # float64 (n_losses,)
    spikes_ptr,  # uint8 (n_rules,)
    thresholds_ptr,  # float64 (n_rules,)
    n_segments,
    n_tensors,
    n_losses,
    n_rules,
    BLOCK_SIZE: tl.constexpr,
):
    INF: tl.constexpr = float("inf")
    lanes = tl.arange(0, BLOCK_SIZE)

    smallest = tl.full((BLOCK_SIZE,), INF, tl.float64)
    any_nan = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    nan = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    posinf = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    neginf = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    i = 0
    while i < n_segments:
        mask = i + lanes < n_segments
        coef = tl.load(coef_ptr + i + lanes, mask=mask, other=INF)
        any_nan = tl.maximum(any_nan, (coef != coef).to(tl.int32))
        smallest = tl.where(coef < smallest, coef, smallest)  # the comparison ignores NaN
        nan += tl.load(summary_ptr + n_segments + i + lanes, mask=mask, other=0.0)
        posinf += tl.load(summary_ptr + 2 * n_segments + i + lanes, mask=mask, other=0.0)
        neginf += tl.load(summary_ptr + 3 * n_segments + i + lanes, mask=mask, other=0.0)
        i += BLOCK_SIZE
    coef = tl.min(smallest, axis=0)
    coef = tl.where(tl.max(any_nan, axis=0) > 0, float("nan"), coef)
    n_nan, n_posinf, n_neginf = tl.sum(nan, axis=0), tl.sum(posinf, axis=0), tl.sum(neginf, axis=0)

    tl.store(row_ptr + TOTAL_NORM, tl.load(total_norm_ptr))
    tl.store(row_ptr + CLIP_COEF, coef)
    tl.store(row_ptr + SKIPPED, tl.load(found_inf_ptr).to(tl.float64))
    tl.store(row_ptr + CLEANED, tl.load(clean_ptr).to(tl.float64))
    tl.store(row_ptr + REASON, tl.load(reason_ptr).to(tl.float64))
    tl.store(row_ptr + STEP, tl.load(counters_ptr + DECIDED).to(tl.float64))
    tl.store(row_ptr + IN_A_ROW, tl.load(counters_ptr + CONSECUTIVE_SKIPS).to(tl.float64))
    tl.store(row_ptr + NAN_COUNT, n_nan)
    tl.store(row_ptr + POSINF_COUNT, n_posinf)
    tl.store(row_ptr + NEGINF_COUNT, n_neginf)
    tl.store(row_ptr + LR, tl.load(lr_ptr))

    table_ptr = row_ptr + CULPRITS_BEGIN
    found = tl.zeros((), dtype=tl.int32)
    i = 0
    if n_nan + n_posinf + n_neginf == 0.0:
        i = n_tensors  # there is nothing to find
    while i < n_tensors:
        mask = i + lanes < n_tensors
        nan_of = tl.load(counts_ptr + i + lanes, mask=mask, other=0)
        posinf_of = tl.load(counts_ptr + n_tensors + i + lanes, mask=mask, other=0)
        neginf_of = tl.load(counts_ptr + 2 * n_tensors + i + lanes, mask=mask, other=0)
        bad = (nan_of + posinf_of + neginf_of > 0).to(tl.int32)
        rank = found + tl.cumsum(bad, axis=0) - 1
        named = (bad > 0) & (rank < CULPRITS)
        at = table_ptr + rank * CULPRIT
        tl.store(at, (i + lanes).to(tl.float64), mask=named)
        tl.store(at + 1, nan_of.to(tl.float64), mask=named)
        tl.store(at + 2, posinf_of.to(tl.float64), mask=named)
        tl.store(at + 3, neginf_of.to(tl.float64), mask=named)
        found += tl.sum(bad, axis=0)
        i += BLOCK_SIZE
    tl.store(row_ptr + N_CULPRITS, found.to(tl.float64))

    rest_ptr = row_ptr + CULPRITS_END
    i = 0
    while i < n_losses:
        mask = i + lanes < n_losses
        loss = tl.load(losses_ptr + i + lanes, mask=mask, other=0.0)
        tl.store(rest_ptr + i + lanes, loss, mask=mask)
        i += BLOCK_SIZE
    rest_ptr += n_losses
    i = 0
    while i < n_rules:
        mask = i + lanes < n_rules
        spike = tl.load(spikes_ptr + i + lanes, mask=mask, other=0)
        threshold = tl.load(thresholds_ptr + i + lanes, mask=mask, other=0.0)
        tl.store(rest_ptr + i + lanes, spike.to(tl.float64), mask=mask)
        tl.store(rest_ptr + n_rules + i + lanes, threshold, mask=mask)
        i += BLOCK_SIZE


launchers: OneProgram = OneProgram(record_kernel)


def record_step(
    row: Tensor,
    summary: Tensor,
    counts: Tensor,
    clip_coef: Tensor,
    found_inf: Tensor,
    clean: Tensor,
    reason: Tensor,
    total_norm: Tensor,
    counters: Tensor,
    lr: Tensor | None,
    losses: Tensor,
    spikes: Tensor,
    thresholds: Tensor,
) -> None:
    """Writes the record of one step to a row; see `fastguard.records.device_row`.

    Args:
        row: float64, contiguous, written; slots of unused culprits keep their values.
        summary: float64 `(4, S)`; see `GradStats`.
        counts: int64 `(3, T)`; see `GradStats`.
        clip_coef, found_inf, clean, reason, total_norm, spikes, thresholds: See `Verdict`.
        counters: int64 `(5,)`; see `GuardState`.
        lr: float64 `()`; None: unknown on the device.
        losses: float64 `(L,)`.
    """
    n_losses, n_rules = losses.numel(), thresholds.numel()
    tensors = (
        row,
        summary,
        counts,
        clip_coef,
        found_inf,
        clean,
        reason,
        total_norm,
        counters,
        summary if lr is None else lr,
        losses if n_losses else summary,
        spikes.view(torch.uint8) if n_rules else summary,
        thresholds if n_rules else summary,
    )
    launch = _variant(row.device, n_rules > 0, summary.shape[1] > OneProgram.MANY)
    launch(1, tensors, summary.shape[1], counts.shape[1], n_losses, n_rules)


@functools.cache
def _variant(device: torch.device, has_rules: bool, many_segments: bool) -> Variant:
    """`has_rules` is not a constant of the kernel, but determines the type of an argument.

    The kernel also goes through the tensors, so it has at least 128 lanes even for one segment.
    """
    n = OneProgram.MANY + many_segments
    return launchers.of(n).variant(device, BLOCK_SIZE=launchers.block_size(n))
