"""Launch 2, decide: one program computes the verdict and updates the state of the guard.

    clip_coef[s] = min(1, max_norm[s] / (norm[s] + 1e-6))
    skip         = a fault, or a spike found by a rule that skips
    changes      = whether apply has anything to do in any segment

I/O: a few numbers per segment, and the rings of the rules; no gradients. One program, in float64.
Faults are detected in `faults`, spikes in `rules`; `coefficients` computes the coefficients.

Comments on comparisons give the result for NaN. Sums over segments and rings are computed in a
different order than in PyTorch; everything else matches `fastguard.stages.reference.decide` bit for
bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.coefficients import clip_coefficient, store_coefficients
from fastguard.kernels.columns import (
    APPLIED,
    CONSECUTIVE_SKIPS,
    COUNTERS,
    DECIDED,
    FOR_SCALE,
    SKIPPED,
    UNDO_COLUMNS,
)
from fastguard.kernels.elements import root
from fastguard.kernels.faults import any_loss_nonfinite, faults_of, never
from fastguard.kernels.launch import OneProgram, Variant
from fastguard.kernels.rules import judged_rules
from fastguard.kernels.summary import whole_model

# Reasons: `fastguard.stages.reason.Reason`.
NONFINITE_GRAD = tl.constexpr(1)
NONFINITE_LOSS = tl.constexpr(2)
GRAD_SPIKE = tl.constexpr(3)
LOSS_SPIKE = tl.constexpr(4)
LOSS_SCALE = tl.constexpr(5)


@triton.jit(
    do_not_specialize=[
        "summary_ptr", "max_norm_ptr", "losses_ptr", "given_ptr", "inv_scale_ptr", "overflow_ptr",
        "falls_ptr", "rules_ptr", "counters_ptr", "windows_ptr", "rings_ptr", "coef_ptr",
        "multiplier_ptr", "found_inf_ptr", "clean_ptr", "reason_ptr", "total_norm_ptr",
        "torch_norm_ptr", "changes_ptr", "spikes_ptr", "thresholds_ptr", "undo_ptr",
        "n_segments", "max_norm_stride", "n_losses", "n_rules", "ring_stride",
    ]
)  # fmt: skip
def decide_kernel(
    summary_ptr,  # float64 (4, n_segments)
    max_norm_ptr,  # float64 (n_segments,), or (1,) with stride 0
    losses_ptr,  # float64 (n_losses,)
    given_ptr,  # uint8 (n_losses,): 0 for a loss that no rank passed
    inv_scale_ptr,  # float64 (1,)
    overflow_ptr,  # float32 (1,): above 0 if a loss scaler found non-finite gradients
    falls_ptr,  # uint8 (1,): 1 if the scaler lowers its scale after an overflow
    rules_ptr,  # float64 (n_rules, RULE_COLUMNS)
    counters_ptr,  # int64 (5,)
    windows_ptr,  # float64 (n_rules, ring_stride)
    rings_ptr,  # int64 (n_rules, 3)
    coef_ptr,  # float64 (n_segments,)
    multiplier_ptr,  # float64 (n_segments,)
    found_inf_ptr,  # float32
    clean_ptr,  # float32
    reason_ptr,  # int64
    total_norm_ptr,  # float64
    torch_norm_ptr,  # float64
    changes_ptr,  # float32
    spikes_ptr,  # uint8 (n_rules,)
    thresholds_ptr,  # float64 (n_rules,)
    undo_ptr,  # float64 (5 + 4 * n_rules,): counters, then per rule its ring and one value
    n_segments,
    max_norm_stride,
    n_losses,
    n_rules,
    ring_stride,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,  # the summary contains norms instead of power sums
    ZERO: tl.constexpr,  # nonfinite="zero"
    PROPAGATE: tl.constexpr,  # nonfinite="propagate"
    HAS_SCALE: tl.constexpr,
    HAS_OVERFLOW: tl.constexpr,
    HAS_FALLS: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RULES: tl.constexpr,  # lanes; 0 without rules
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    total_norm, n_nan, n_infinite = whole_model(
        summary_ptr, n_segments, P, INF_NORM, ROOTED, BLOCK_SIZE
    )
    if ROOTED == 0:
        total_norm = root(total_norm, P, INF_NORM)
    has_nan = n_nan > 0.0
    has_infinite = n_infinite > 0.0
    bad_grad = has_nan | has_infinite

    loss_fault = any_loss_nonfinite(losses_ptr, given_ptr, n_losses, HAS_GIVEN, BLOCK_SIZE)
    grad_fault, loss_fault, too_large, overflow, scale_fixes = faults_of(
        total_norm, bad_grad, overflow_ptr, falls_ptr, loss_fault,
        ZERO, PROPAGATE, HAS_OVERFLOW, HAS_FALLS,
    )  # fmt: skip
    fault = grad_fault | loss_fault | too_large

    skip = fault
    spiked = never()
    grad_spiked = never()
    spike_coef = tl.full((), 1.0, tl.float64)
    if RULES > 0:
        spiked, grad_spiked, spike_skips, limit = judged_rules(
            rules_ptr, rings_ptr, windows_ptr, losses_ptr, given_ptr, spikes_ptr, thresholds_ptr,
            undo_ptr, n_rules, ring_stride, total_norm, fault, bad_grad,
            ZERO, HAS_GIVEN, RULES, WINDOW,
        )  # fmt: skip
        skip = fault | spike_skips
        spike_coef = clip_coefficient(total_norm, limit)

    scales = store_coefficients(
        summary_ptr, max_norm_ptr, inv_scale_ptr, coef_ptr, multiplier_ptr, n_segments,
        max_norm_stride, spike_coef, skip, P, INF_NORM, ROOTED, PROPAGATE, HAS_SCALE, BLOCK_SIZE,
    )  # fmt: skip

    clean = never()
    if ZERO:
        clean = bad_grad & (skip == 0)
    reason = tl.where(grad_spiked, GRAD_SPIKE, tl.where(spiked, LOSS_SPIKE, 0))
    reason = tl.where(loss_fault, NONFINITE_LOSS, reason)
    reason = tl.where(bad_grad | overflow | too_large, NONFINITE_GRAD, reason)
    reason = tl.where(scale_fixes, LOSS_SCALE, reason)
    torch_norm = tl.where(has_infinite, float("inf"), total_norm)
    tl.store(found_inf_ptr, skip.to(tl.float32))
    tl.store(clean_ptr, clean.to(tl.float32))
    tl.store(reason_ptr, reason.to(tl.int64))
    tl.store(total_norm_ptr, total_norm)
    tl.store(torch_norm_ptr, tl.where(has_nan, float("nan"), torch_norm))
    tl.store(changes_ptr, (scales | clean).to(tl.float32))
    if HAS_STATE:
        count_step(counters_ptr, undo_ptr, skip.to(tl.int64), scale_fixes.to(tl.int64))


@triton.jit
def count_step(counters_ptr, undo_ptr, skipped, lowered):
    """Updates the counters, and saves the previous values to undo a step that fails."""
    decided = tl.load(counters_ptr + DECIDED)
    applied = tl.load(counters_ptr + APPLIED)
    skips_so_far = tl.load(counters_ptr + SKIPPED)
    in_a_row = tl.load(counters_ptr + CONSECUTIVE_SKIPS)
    for_scale = tl.load(counters_ptr + FOR_SCALE)
    tl.store(undo_ptr + DECIDED, decided.to(tl.float64))
    tl.store(undo_ptr + APPLIED, applied.to(tl.float64))
    tl.store(undo_ptr + SKIPPED, skips_so_far.to(tl.float64))
    tl.store(undo_ptr + CONSECUTIVE_SKIPS, in_a_row.to(tl.float64))
    tl.store(undo_ptr + FOR_SCALE, for_scale.to(tl.float64))
    tl.debug_barrier()  # all threads must have read the counters before any thread writes them
    tl.store(counters_ptr + DECIDED, decided + 1)
    tl.store(counters_ptr + APPLIED, applied + 1 - skipped)
    tl.store(counters_ptr + SKIPPED, skips_so_far + skipped)
    tl.store(counters_ptr + CONSECUTIVE_SKIPS, (in_a_row + 1 - lowered) * skipped)
    tl.store(counters_ptr + FOR_SCALE, for_scale + lowered)


RESULTS = (
    "clip_coef", "multiplier", "found_inf", "clean", "reason", "total_norm", "torch_norm", "changes"
)  # fmt: skip
launchers: OneProgram = OneProgram(decide_kernel)


def decide_step(
    summary: Tensor,
    norm_type: float,
    rooted: bool,
    max_norm: Tensor,
    nonfinite: str,
    losses: Tensor,
    inv_scale: Tensor | None,
    overflow: Tensor | None,
    rules: Tensor | None,
    counters: Tensor | None,
    windows: Tensor | None,
    rings: Tensor | None,
    given: Tensor | None = None,
    scale_falls: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Decides one step.

    Args:
        summary: float64 `(4, S)`: power sums and counts.
        norm_type: p.
        rooted: Whether the summary contains norms.
        max_norm: float64 `(S,)` or `(1,)`.
        nonfinite: `"skip"`, `"raise"`, `"zero"` or `"propagate"`.
        losses: float64 `(L,)`.
        inv_scale: float64 `()`, or None.
        overflow: `()`, above 0 if a loss scaler found non-finite gradients, or None.
        rules: float64 `(K, 8)`, see `columns`; None without rules.
        counters, windows, rings: The state of the guard, changed in place; None without a state.
        given: bool `(L,)`: which losses were passed; None: all.
        scale_falls: bool `()`: whether the scaler lowers its scale after an overflow; None:
            unknown.

    Returns:
        The fields of `fastguard.stages.contract.Verdict` by name; and the previous state, float64
        `(5 + 4 * K,)`: the counters, and for each rule its row of `rings` and the value that was
        overwritten in `windows`. Without a state, its elements are undefined.
    """
    device, n_segments, n_losses = summary.device, summary.shape[1], losses.numel()
    n_rules = 0 if rules is None else rules.shape[0]
    ring_stride = windows.shape[1] if n_rules else 0
    *likes, spikes, thresholds, undo = _templates(device, n_segments, n_rules)
    undo = torch.empty_like(undo) if counters is not None else undo
    results = tuple(map(torch.empty_like, likes))
    if n_rules:
        spikes, thresholds = torch.empty_like(spikes), torch.empty_like(thresholds)
    tensors = (
        summary,
        max_norm,
        losses if n_losses else summary,
        summary if given is None else given.view(torch.uint8),
        summary if inv_scale is None else inv_scale,
        summary if overflow is None else overflow,
        summary if scale_falls is None else scale_falls.view(torch.uint8),
        rules if n_rules else summary,
        summary if counters is None else counters,
        windows if ring_stride else summary,
        rings if n_rules else summary,
        *results,
        spikes.view(torch.uint8) if n_rules else summary,
        thresholds if n_rules else summary,
        undo,
    )
    launch = _variant(
        device,
        norm_type,
        rooted,
        nonfinite,
        None if inv_scale is None else inv_scale.dtype,
        None if overflow is None else overflow.dtype,
        overflow is not None and scale_falls is not None,
        given is not None,
        counters is not None,
        n_segments,
        n_rules,
        ring_stride,
    )
    stride = 0 if max_norm.numel() == 1 else 1
    launch(1, tensors, n_segments, stride, n_losses, n_rules, ring_stride)
    verdict = dict(zip(RESULTS, results, strict=True))
    return {**verdict, "spikes": spikes, "thresholds": thresholds}, undo


@functools.lru_cache(maxsize=64)
def _templates(device: torch.device, n_segments: int, n_rules: int) -> tuple[Tensor, ...]:
    """Returns templates of the results of a decision.

    `torch.empty_like` takes 0.8 µs, and `torch.empty` with shape, dtype and device 1.5 µs.
    """

    def like(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return (
        like(n_segments),  # clip_coef
        like(n_segments),  # multiplier
        like(dtype=torch.float32),  # found_inf
        like(dtype=torch.float32),  # clean
        like(dtype=torch.int64),  # reason
        like(),  # total_norm
        like(),  # torch_norm
        like(dtype=torch.float32),  # changes
        like(n_rules, dtype=torch.bool),  # spikes
        like(n_rules),  # thresholds
        like(COUNTERS.value + UNDO_COLUMNS.value * n_rules),  # undo
    )


@functools.lru_cache(maxsize=256)
def _variant(
    device: torch.device,
    norm_type: float,
    rooted: bool,
    nonfinite: str,
    scale_dtype: torch.dtype | None,
    overflow_dtype: torch.dtype | None,
    has_falls: bool,
    has_given: bool,
    has_state: bool,
    n_segments: int,
    n_rules: int,
    ring_stride: int,
) -> Variant:
    """Returns the kernel variant for these settings.

    The dtypes are part of the cache key, since they are argument types, but not kernel constants.
    """
    return launchers.of(n_segments).variant(
        device,
        P=norm_type,
        INF_NORM=norm_type == float("inf"),
        ROOTED=rooted,
        ZERO=nonfinite == "zero",
        PROPAGATE=nonfinite == "propagate",
        HAS_SCALE=scale_dtype is not None,
        HAS_OVERFLOW=overflow_dtype is not None,
        HAS_FALLS=has_falls,
        HAS_GIVEN=has_given,
        HAS_STATE=has_state,
        RULES=triton.next_power_of_2(n_rules) if n_rules else 0,
        WINDOW=min(32, triton.next_power_of_2(ring_stride)) if ring_stride else 1,
        BLOCK_SIZE=launchers.block_size(n_segments),
    )
