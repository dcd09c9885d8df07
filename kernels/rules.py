"""The spike rules inside `decide`: their table, their thresholds, and the rings of accepted values.

    threshold[k] = mean + sigma * max(std, 0.01 * |mean|, tiny)      of the values in ring k

    rules    float64 (K, 8): the columns below
    windows  float64 (K, W), rings int64 (K, 3): see `fastguard.stages.contract.GuardState`

The rules are lanes of one tile, `RULES` of them, and their rings are walked in blocks of `WINDOW`
values: nothing passes from lane to lane through memory."""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-1022)  # smallest normal float64

SIGMA = tl.constexpr(0)
WARMUP = tl.constexpr(1)
WINDOW_SIZE = tl.constexpr(2)  # 0 for a fixed threshold
FIXED = tl.constexpr(3)  # inf for a sigma rule
SKIPS = tl.constexpr(4)
CLIPS = tl.constexpr(5)
SIGNAL = tl.constexpr(6)  # index of the loss; -1: the gradient norm; -2: this step has no such loss
COLUMNS = tl.constexpr(8)


@triton.jit
def thresholds_of(
    rule_ptr,
    windows_ptr,
    ring_stride,
    k,
    is_rule,
    window,
    filled,
    RULES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """float64 `(RULES,)`: what each rule compares with. Two passes over the rings, mean and then
    deviations from it. Rings hold finite values only, so that no NaN comes here."""
    sigma = tl.load(rule_ptr + SIGMA, mask=is_rule, other=0.0)
    warmup = tl.load(rule_ptr + WARMUP, mask=is_rule, other=0.0)
    fixed = tl.load(rule_ptr + FIXED, mask=is_rule, other=float("inf"))
    j = tl.arange(0, WINDOW)
    ring_ptr = windows_ptr + k[:, None].to(tl.int64) * ring_stride
    n = tl.maximum(filled, 1).to(tl.float64)
    acc = tl.zeros((RULES, WINDOW), dtype=tl.float64)
    i = 0
    while i < ring_stride:
        here = i + j[None, :] < filled[:, None]
        acc += tl.load(ring_ptr + i + j[None, :], mask=here, other=0.0)
        i += WINDOW
    mean = tl.sum(acc, axis=1) / n
    acc = tl.zeros((RULES, WINDOW), dtype=tl.float64)
    i = 0
    while i < ring_stride:
        here = i + j[None, :] < filled[:, None]
        deviation = tl.load(ring_ptr + i + j[None, :], mask=here, other=0.0) - mean[:, None]
        deviation = tl.where(here, deviation, 0.0)
        acc += deviation * deviation
        i += WINDOW
    std = tl.sqrt(tl.sum(acc, axis=1) / n)
    moving = mean + sigma * tl.maximum(std, tl.maximum(0.01 * tl.abs(mean), TINY))
    judged = (window > 0) & (filled.to(tl.float64) >= warmup)
    return tl.where(judged, moving, fixed)


@triton.jit
def enter_rings(windows_ptr, rings_ptr, ring_stride, k, is_rule, window, filled, value, moves):
    """Puts `value` into the ring of each rule that `moves`, in place of the oldest when full."""
    at = tl.load(rings_ptr + 3 * k + 1, mask=is_rule, other=0)
    tl.debug_barrier()  # all threads have read the rings before one writes them
    slot_ptr = windows_ptr + k.to(tl.int64) * ring_stride + at
    tl.store(slot_ptr, value, mask=moves)
    step = moves.to(tl.int64)
    tl.store(rings_ptr + 3 * k, tl.minimum(filled + step, window), mask=is_rule)
    tl.store(rings_ptr + 3 * k + 1, (at + step) % tl.maximum(window, 1), mask=is_rule)
