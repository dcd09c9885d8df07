"""The spike rules in `decide`: computes thresholds and updates the rings of accepted values.

    threshold[k] = mean + sigma * max(std, 0.01 * |mean|, tiny)      over the values in ring k

    rules    float64 (K, 8): see `columns`
    windows  float64 (K, W), rings int64 (K, 3): see `fastguard.stages.contract.GuardState`

Each rule is one lane of a tile with `RULES` lanes. The rings are read in blocks of `WINDOW` values,
so that lanes do not exchange data through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastguard.kernels.columns import (
    CLIPS,
    CONSECUTIVE_SPIKES,
    COUNTERS,
    FILLED,
    FIXED,
    NEXT_SLOT,
    RING_COLUMNS,
    RULE_COLUMNS,
    SIGMA,
    SIGNAL,
    SKIPS,
    UNDO_COLUMNS,
    UNDO_VALUE,
    WARMUP,
    WINDOW_SIZE,
)
from fastguard.kernels.faults import any_of, spread

TINY = tl.constexpr(2.0**-1022)  # smallest normal float64


@triton.jit
def judged_rules(
    rules_ptr,
    rings_ptr,
    windows_ptr,
    losses_ptr,
    given_ptr,
    spikes_ptr,
    thresholds_ptr,
    undo_ptr,
    n_rules,
    ring_stride,
    total_norm,
    fault,
    bad_grad,
    ZERO: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    RULES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Applies the rules to the signals of a step, and adds accepted values to the rings.

    Returns:
        spiked: Whether any rule detected a spike.
        grad_spiked: Whether a rule detected a spike of the gradient norm.
        skips: Whether any rule that detected a spike skips the step.
        limit: float64: the limit for the total norm; inf if there is no limit.
    """
    INF: tl.constexpr = float("inf")
    NAN: tl.constexpr = float("nan")
    k = tl.arange(0, RULES)
    is_rule = k < n_rules
    rule_ptr = rules_ptr + k * RULE_COLUMNS
    ring_ptr = rings_ptr + k * RING_COLUMNS
    window = tl.load(rule_ptr + WINDOW_SIZE, mask=is_rule, other=0.0).to(tl.int64)
    can_skip = tl.load(rule_ptr + SKIPS, mask=is_rule, other=0.0) > 0.0
    can_clip = tl.load(rule_ptr + CLIPS, mask=is_rule, other=0.0) > 0.0
    signal = tl.load(rule_ptr + SIGNAL, mask=is_rule, other=-2.0).to(tl.int32)
    filled = tl.load(ring_ptr + FILLED, mask=is_rule, other=0)
    at = tl.load(ring_ptr + NEXT_SLOT, mask=is_rule, other=0)
    consecutive = tl.load(ring_ptr + CONSECUTIVE_SPIKES, mask=is_rule, other=0)
    on_gradient = signal == -1
    is_given = signal >= 0
    if HAS_GIVEN:
        is_given = is_given & (tl.load(given_ptr + signal, mask=is_given, other=0) > 0)
    value = tl.load(losses_ptr + signal, mask=is_given, other=NAN)
    value = tl.where(on_gradient, total_norm, value)

    threshold = thresholds_of(
        rule_ptr, windows_ptr, ring_stride, k, is_rule, window, filled, RULES, WINDOW
    )
    # the comparison is false for NaN, which is a fault
    exceeds = (value > threshold) & spread(fault == 0, RULES)
    persistent = (window > 0) & (consecutive >= window)
    spike = exceeds & (persistent == 0)
    skips = any_of(spike & can_skip)
    limit = tl.min(tl.where(spike & can_clip, threshold, INF), axis=0)

    usable = fault == 0
    if ZERO == 0:
        usable = usable & (bad_grad == 0)
    # A loss that was not passed to `step` is NaN here, and is ignored.
    judged = (tl.abs(value) < INF) & spread(usable, RULES)
    moves = judged & spread(total_norm > 0.0, RULES)
    moves = moves & (spike | spread((fault | skips) == 0, RULES)) & (window > 0) & is_rule
    entry = tl.where(spike, threshold, value)

    # Saves the values that are about to change, to undo a step that fails.
    slot_ptr = windows_ptr + k.to(tl.int64) * ring_stride + at
    held = tl.load(slot_ptr, mask=is_rule & (window > 0), other=0.0)
    held_ptr = undo_ptr + COUNTERS + k * UNDO_COLUMNS
    tl.store(held_ptr + FILLED, filled.to(tl.float64), mask=is_rule)
    tl.store(held_ptr + NEXT_SLOT, at.to(tl.float64), mask=is_rule)
    tl.store(held_ptr + CONSECUTIVE_SPIKES, consecutive.to(tl.float64), mask=is_rule)
    tl.store(held_ptr + UNDO_VALUE, held, mask=is_rule)

    tl.debug_barrier()  # all threads must have read the rings before any thread writes them
    tl.store(slot_ptr, entry, mask=moves)  # overwrites the oldest value if the ring is full
    step = moves.to(tl.int64)
    streak = tl.where(exceeds, consecutive + 1, 0)
    tl.store(ring_ptr + FILLED, tl.minimum(filled + step, window), mask=is_rule)
    tl.store(ring_ptr + NEXT_SLOT, (at + step) % tl.maximum(window, 1), mask=is_rule)
    tl.store(ring_ptr + CONSECUTIVE_SPIKES, tl.where(judged, streak, consecutive), mask=is_rule)
    tl.store(spikes_ptr + k, spike.to(tl.uint8), mask=is_rule)
    tl.store(thresholds_ptr + k, threshold, mask=is_rule)
    return any_of(spike), any_of(spike & on_gradient), skips, limit


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
    """Returns the threshold of each rule, float64 `(RULES,)`.

    The first pass over the rings computes the mean, and the second pass the standard deviation.
    Rings contain only finite values, so the results are not NaN.
    """
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
