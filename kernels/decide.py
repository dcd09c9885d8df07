"""Launch 2, decide: one program gives the verdict and brings the guard's state up to date.

    clip_coef[s] = min(1, max_norm[s] / (norm[s] + 1e-6))
    skip         = a fault, or a spike of a rule that skips          see `rules`

I/O: a few numbers a segment, and the rings of the rules; no gradient. One warp, float64.

Every comparison says what NaN does. Sums over segments and rings are added in another order than
PyTorch's; all else is bit for bit the arithmetic of `fastguard.stages.reference.decide`."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.elements import root
from fastguard.kernels.launch import Launcher, Variant
from fastguard.kernels.rules import (
    CLIPS,
    COLUMNS,
    SIGNAL,
    SKIPS,
    WINDOW_SIZE,
    enter_rings,
    thresholds_of,
)
from fastguard.kernels.summary import whole_model

# Reasons: `fastguard.stages.reason.Reason`.
NONFINITE_GRAD = tl.constexpr(1)
NONFINITE_LOSS = tl.constexpr(2)
GRAD_SPIKE = tl.constexpr(3)
LOSS_SPIKE = tl.constexpr(4)
LOSS_SCALE = tl.constexpr(5)


@triton.jit
def clip_coefficient(norm, max_norm):
    """`min(1, max_norm / (norm + 1e-6))`; a limit of inf gives 1 for every norm, NaN a NaN."""
    coef = max_norm / (norm + 1e-6)
    coef = tl.where(coef > 1.0, 1.0, coef)  # NaN is not > 1 and stays NaN
    return tl.where(max_norm == float("inf"), 1.0, coef)


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def spread(condition, N: tl.constexpr):
    """One condition in N lanes."""
    return tl.where(condition, tl.full((N,), 1, tl.int32), tl.full((N,), 0, tl.int32)) > 0


@triton.jit(
    do_not_specialize=[
        "summary_ptr", "max_norm_ptr", "losses_ptr", "given_ptr", "inv_scale_ptr", "overflow_ptr",
        "falls_ptr", "rules_ptr", "counters_ptr", "windows_ptr", "rings_ptr", "coef_ptr",
        "multiplier_ptr", "found_inf_ptr", "clean_ptr", "reason_ptr", "total_norm_ptr",
        "torch_norm_ptr", "spikes_ptr", "thresholds_ptr", "undo_ptr",
        "n_segments", "max_norm_stride", "n_losses", "n_rules", "ring_stride",
    ]
)  # fmt: skip
def decide_kernel(
    summary_ptr,  # float64 (4, n_segments)
    max_norm_ptr,  # float64 (n_segments,), or (1,) with stride 0
    losses_ptr,  # float64 (n_losses,)
    given_ptr,  # uint8 (n_losses,): 0 for a loss that no rank gave
    inv_scale_ptr,  # float64 (1,)
    overflow_ptr,  # float32 (1,): > 0 if a loss scaler found non-finite gradients
    falls_ptr,  # uint8 (1,): 1 if the scaler lowers its scale after an overflow
    rules_ptr,  # float64 (n_rules, COLUMNS)
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
    spikes_ptr,  # uint8 (n_rules,)
    thresholds_ptr,  # float64 (n_rules,)
    undo_ptr,  # float64 (5 + 4 * n_rules,): the counters, and of each rule its ring and one value
    n_segments,
    max_norm_stride,
    n_losses,
    n_rules,
    ring_stride,
    P: tl.constexpr,
    INF_NORM: tl.constexpr,
    ROOTED: tl.constexpr,  # the summary holds norms in place of power sums
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
    INF: tl.constexpr = float("inf")
    NAN: tl.constexpr = float("nan")
    lanes = tl.arange(0, BLOCK_SIZE)

    total_norm, n_nan, n_infinite = whole_model(
        summary_ptr, n_segments, P, INF_NORM, ROOTED, BLOCK_SIZE
    )
    if ROOTED == 0:
        total_norm = root(total_norm, P, INF_NORM)
    has_nan = n_nan > 0.0
    has_infinite = n_infinite > 0.0
    bad_grad = has_nan | has_infinite

    overflow = bad_grad & (bad_grad == 0)
    if HAS_OVERFLOW:
        overflow = tl.load(overflow_ptr) > 0.0  # NaN is no overflow, as in the reference
    lost = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    i = 0
    while i < n_losses:
        is_loss = i + lanes < n_losses
        if HAS_GIVEN:
            is_loss = is_loss & (tl.load(given_ptr + i + lanes, mask=is_loss, other=0) > 0)
        loss = tl.load(losses_ptr + i + lanes, mask=is_loss, other=0.0)
        lost = tl.maximum(lost, ((tl.abs(loss) < INF) == 0).to(tl.int32))  # NaN is not < inf
        i += BLOCK_SIZE
    loss_fault = tl.max(lost, axis=0) > 0
    lowers = overflow & (overflow == 0)
    if HAS_FALLS:
        lowers = overflow & (tl.load(falls_ptr) > 0) & (loss_fault == 0)
    too_large = total_norm == INF  # no float64 holds the norm of these finite elements
    if PROPAGATE:
        grad_fault = overflow
        too_large = too_large & (too_large == 0)  # clipped to zero, as by torch
        loss_fault = loss_fault & (loss_fault == 0)
    elif ZERO:
        # Cleaning cures what was counted; a fault that only the scaler saw is not cured by it. What
        # a lower scale cures is not cleaned.
        grad_fault = overflow & ((bad_grad == 0) | lowers)
    else:
        grad_fault = overflow | bad_grad
    fault = grad_fault | loss_fault | too_large

    skip = fault
    limit = tl.full((), INF, tl.float64)
    spiked = fault & (fault == 0)
    grad_spiked = spiked
    if RULES > 0:
        k = tl.arange(0, RULES)
        is_rule = k < n_rules
        rule_ptr = rules_ptr + k * COLUMNS
        window = tl.load(rule_ptr + WINDOW_SIZE, mask=is_rule, other=0.0).to(tl.int64)
        skips = tl.load(rule_ptr + SKIPS, mask=is_rule, other=0.0) > 0.0
        clips = tl.load(rule_ptr + CLIPS, mask=is_rule, other=0.0) > 0.0
        signal = tl.load(rule_ptr + SIGNAL, mask=is_rule, other=-2.0).to(tl.int32)
        filled = tl.load(rings_ptr + 3 * k, mask=is_rule, other=0)
        consecutive = tl.load(rings_ptr + 3 * k + 2, mask=is_rule, other=0)
        on_gradient = signal == -1
        is_given = signal >= 0
        if HAS_GIVEN:
            is_given = is_given & (tl.load(given_ptr + signal, mask=is_given, other=0) > 0)
        value = tl.load(losses_ptr + signal, mask=is_given, other=NAN)
        value = tl.where(on_gradient, total_norm, value)

        threshold = thresholds_of(
            rule_ptr, windows_ptr, ring_stride, k, is_rule, window, filled, RULES, WINDOW
        )
        exceeds = (value > threshold) & spread(fault == 0, RULES)  # NaN: a fault, no spike
        lasting = (window > 0) & (consecutive >= window)
        spike = exceeds & (lasting == 0)
        spiked = any_of(spike)
        grad_spiked = any_of(spike & on_gradient)
        skip = fault | any_of(spike & skips)
        limit = tl.min(tl.where(spike & clips, threshold, INF), axis=0)

        usable = fault == 0
        if ZERO == 0:
            usable = usable & (bad_grad == 0)
        # A loss that this step did not give is NaN, and says nothing.
        heard = (tl.abs(value) < INF) & spread(usable, RULES)
        moves = heard & spread(total_norm > 0.0, RULES) & (spike | spread(skip == 0, RULES))
        moves = moves & (window > 0) & is_rule
        streak = tl.where(exceeds, consecutive + 1, 0)
        entry = tl.where(spike, threshold, value)
        # What is about to change, for a step that fails.
        at = tl.load(rings_ptr + 3 * k + 1, mask=is_rule, other=0)
        slot_ptr = windows_ptr + k.to(tl.int64) * ring_stride + at
        held = tl.load(slot_ptr, mask=is_rule & (window > 0), other=0.0)
        held_ptr = undo_ptr + 5 + 4 * k
        tl.store(held_ptr, filled.to(tl.float64), mask=is_rule)
        tl.store(held_ptr + 1, at.to(tl.float64), mask=is_rule)
        tl.store(held_ptr + 2, consecutive.to(tl.float64), mask=is_rule)
        tl.store(held_ptr + 3, held, mask=is_rule)
        enter_rings(windows_ptr, rings_ptr, ring_stride, k, is_rule, window, filled, entry, moves)
        tl.store(rings_ptr + 3 * k + 2, tl.where(heard, streak, consecutive), mask=is_rule)
        tl.store(spikes_ptr + k, spike.to(tl.uint8), mask=is_rule)
        tl.store(thresholds_ptr + k, threshold, mask=is_rule)

    spike_coef = clip_coefficient(total_norm, limit)
    i = 0
    while i < n_segments:
        mask = i + lanes < n_segments
        norm = tl.load(summary_ptr + i + lanes, mask=mask, other=0.0)
        if ROOTED == 0:
            norm = root(norm, P, INF_NORM)
        if PROPAGATE:
            nan = tl.load(summary_ptr + n_segments + i + lanes, mask=mask, other=0.0)
            posinf = tl.load(summary_ptr + 2 * n_segments + i + lanes, mask=mask, other=0.0)
            neginf = tl.load(summary_ptr + 3 * n_segments + i + lanes, mask=mask, other=0.0)
            norm = tl.where(posinf + neginf > 0.0, INF, norm)
            norm = tl.where(nan > 0.0, NAN, norm)
        max_norm = tl.load(max_norm_ptr + (i + lanes) * max_norm_stride, mask=mask, other=INF)
        coef = clip_coefficient(norm, max_norm)
        # The smaller; NaN in either wins.
        coef = tl.where(spike_coef < coef, spike_coef, coef)
        coef = tl.where(spike_coef == spike_coef, coef, spike_coef)
        multiplier = coef
        if HAS_SCALE:
            multiplier = coef * tl.load(inv_scale_ptr)
        tl.store(coef_ptr + i + lanes, coef, mask=mask)
        tl.store(multiplier_ptr + i + lanes, tl.where(skip, 1.0, multiplier), mask=mask)
        i += BLOCK_SIZE

    skipped = skip.to(tl.int64)
    clean = bad_grad & (skip == 0)
    if ZERO == 0:
        clean = clean & (clean == 0)
    reason = tl.where(grad_spiked, GRAD_SPIKE, tl.where(spiked, LOSS_SPIKE, 0))
    reason = tl.where(loss_fault, NONFINITE_LOSS, reason)
    reason = tl.where(bad_grad | overflow | too_large, NONFINITE_GRAD, reason)
    reason = tl.where(lowers, LOSS_SCALE, reason)
    tl.store(found_inf_ptr, skipped.to(tl.float32))
    tl.store(clean_ptr, clean.to(tl.float32))
    tl.store(reason_ptr, reason.to(tl.int64))
    tl.store(total_norm_ptr, total_norm)
    tl.store(torch_norm_ptr, tl.where(has_nan, NAN, tl.where(has_infinite, INF, total_norm)))
    if HAS_STATE:
        decided = tl.load(counters_ptr)
        applied = tl.load(counters_ptr + 1)
        skips_so_far = tl.load(counters_ptr + 2)
        in_a_row = tl.load(counters_ptr + 3)
        for_scale = tl.load(counters_ptr + 4)
        lowered = lowers.to(tl.int64)
        tl.store(undo_ptr, decided.to(tl.float64))
        tl.store(undo_ptr + 1, applied.to(tl.float64))
        tl.store(undo_ptr + 2, skips_so_far.to(tl.float64))
        tl.store(undo_ptr + 3, in_a_row.to(tl.float64))
        tl.store(undo_ptr + 4, for_scale.to(tl.float64))
        tl.debug_barrier()
        tl.store(counters_ptr, decided + 1)
        tl.store(counters_ptr + 1, applied + 1 - skipped)
        tl.store(counters_ptr + 2, skips_so_far + skipped)
        tl.store(counters_ptr + 3, (in_a_row + 1 - lowered) * skipped)
        tl.store(counters_ptr + 4, for_scale + lowered)


_decide = Launcher(decide_kernel, num_warps=1)


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
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Decides one step.

    Args:
        summary: float64 `(4, S)`: power sums and counts.
        norm_type: p.
        rooted: Whether the summary holds norms.
        max_norm: float64 `(S,)` or `(1,)`.
        nonfinite: `"skip"`, `"raise"`, `"zero"` or `"propagate"`.
        losses: float64 `(L,)`.
        inv_scale: float64 `()`, or None.
        overflow: `()`, > 0 if a loss scaler found non-finite gradients, or None.
        rules: float64 `(K, 8)`: the columns of `rules`, or None without rules.
        counters, windows, rings: The guard's state, changed in place; None without a state.
        given: bool `(L,)`: which losses there are; None: all.
        scale_falls: bool `()`: the scaler lowers its scale after an overflow; None: not known.

    Returns:
        The fields of `fastguard.stages.contract.Verdict`, in their order; and what the state was
        before, float64 `(5 + 4 * K,)`, nothing without a state: the counters, and of each rule its
        row of `rings` and the value that was overwritten in `windows`.
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
    return (*results, spikes, thresholds), undo


@functools.lru_cache(maxsize=64)
def _templates(device: torch.device, n_segments: int, n_rules: int) -> tuple[Tensor, ...]:
    """Tensors like those of a decision: `torch.empty_like` takes 0.8 µs, `torch.empty` of a shape,
    a dtype and a device 1.5."""

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
        like(n_rules, dtype=torch.bool),  # spikes
        like(n_rules),  # thresholds
        like(5 + 4 * n_rules),  # undo
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
    """The dtypes are no constants of the kernel, but types of arguments; None: there is none."""
    return _decide.variant(
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
        BLOCK_SIZE=min(128, max(32, triton.next_power_of_2(n_segments))),
    )
