"""The reference implementation of the stages, in plain PyTorch: for all devices, and for tests.

The kernels and `stages.cpu` have the same signatures and results, and are tested against this
module. It computes tensor by tensor in float64, without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.errors import NAMED_CULPRITS
from fastguard.gradients.buckets import GradBucket
from fastguard.stages.contract import (
    GuardState,
    Policy,
    Signals,
    Verdict,
    only_lowers_scale,
    signal_values,
)
from fastguard.stages.formulas import (
    SMALLEST_FACTOR,
    TINY,
    clip_coefficients,
    factor_dtype,
    holds_norms,
    norm_of_norms,
    propagated_norms,
    root,
    unscaled,
)
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason
from fastguard.stages.reference_units import clip_units as clip_units
from fastguard.stages.reference_watch import count_exponents as count_exponents
from fastguard.stages.reference_watch import read_bits as read_bits
from fastguard.stages.rule_table import RuleTable, rule_table_of


def measure_bucket(
    bucket: GradBucket,
    n_segments: int,
    n_tensors: int,
    norm_type: float,
    inv_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes power sums and counts of one bucket, in float64.

    All tensors are computed from the gradients, and none is changed in place. The function
    therefore also works within function transforms and for wrapper subclasses.

    Args:
        bucket: Gradients of one device and dtype.
        n_segments: S.
        n_tensors: T.
        norm_type: p > 0, or `inf`.
        inv_scale: float `()`: the factor that unscales the gradients; None: 1.

    Returns:
        `summary` float64 `(4, S)`, with norms instead of power sums if `holds_norms` is true for
        this dtype, and `counts` int64 `(3, T)`: see `GradStats`.
    """
    rooted = holds_norms(bucket.dtype, norm_type)
    sums: list[list[Tensor]] = [[] for _ in range(n_segments)]
    found: list[list[Tensor]] = [[] for _ in range(n_segments)]
    of_tensor: dict[int, Tensor] = {}
    for grad, i, segment in zip(bucket.grads, bucket.tensor_ids, bucket.segment_ids, strict=True):
        x = grad.double()
        finite = x.isfinite()  # this is False for NaN
        magnitude = torch.where(finite, x, 0.0).abs()
        largest = magnitude.amax() if x.numel() else magnitude.sum()
        if norm_type == math.inf:
            sums[segment].append(largest)
        elif rooted:
            unit = torch.where(largest > 0, largest, 1.0)
            norm = root((magnitude / unit).pow(norm_type).sum(), norm_type) * unit
            sums[segment].append(norm)
        else:
            sums[segment].append(magnitude.pow(norm_type).sum())
        counts = torch.stack([x.isnan().sum(), x.isposinf().sum(), x.isneginf().sum()])
        found[segment].append(counts)
        of_tensor[i] = counts
    none = next(iter(of_tensor.values())).new_zeros(3)  # a bucket holds at least one tensor
    columns = [
        torch.cat([joined(own, none, norm_type, rooted), _added(counts, none)])
        for own, counts in zip(sums, found, strict=True)
    ]
    summary = unscaled(torch.stack(columns, 1), bucket.dtype, norm_type, inv_scale)
    return summary, torch.stack([of_tensor.get(i, none) for i in range(n_tensors)], 1)


def joined(parts: Sequence[Tensor], like: Tensor, norm_type: float, rooted: bool) -> Tensor:
    """Combines power sums, or norms, of tensors of a segment into one, float64 `(1,)`."""
    if not parts:
        return like.new_zeros(1, dtype=torch.float64)
    each = torch.stack(list(parts))
    if norm_type == math.inf:
        return each.amax().reshape(1)
    return (norm_of_norms(each, norm_type) if rooted else each.sum()).reshape(1)


def _added(counts: Sequence[Tensor], none: Tensor) -> Tensor:
    """Returns the sum of the counts, float64 `(3,)`."""
    return torch.stack([*counts, none]).sum(0).double()


def decide(stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy) -> Verdict:
    """See `fastguard.stages.decide.decide`."""
    if state is not None:
        state.note_all()
    device = stats.summary.device
    total_norm = stats.total_norm64
    bad_grad = stats.segment_counts.sum() > 0
    too_large = total_norm == math.inf  # the norm of finite elements exceeds float64
    never = torch.zeros_like(bad_grad)
    overflow = never if signals.found_inf is None else signals.found_inf > 0
    lowers = only_lowers_scale(signals)
    if lowers is None:
        lowers = never
    if policy.nonfinite == "propagate":
        grad_fault, loss_fault = overflow, never
        too_large = never  # such gradients are clipped to zero, as in torch
    else:
        # Cleaning fixes the elements that were counted, but not an overflow that only the scaler
        # found. An overflow that a lower scale fixes is not cleaned.
        cured = bad_grad & ~lowers if policy.nonfinite == "zero" else never
        grad_fault = (overflow | bad_grad) & ~cured | too_large
        lost = ~signals.losses.isfinite()  # NaN is not finite
        loss_fault = (lost if signals.given is None else lost & signals.given).any()
    fault = grad_fault | loss_fault

    table = None
    if policy.rules and state is not None:
        table = rule_table_of(policy.rules, policy.signals, device)
        values = signal_values(stats, signals, policy.signals)
        thresholds = _thresholds(state, table)
        # The comparison is False for NaN, since a non-finite loss is a fault and not a spike.
        exceeds = (values > thresholds) & ~fault
        persistent = (table.window > 0) & (state.rings[:, 2] >= table.window)
        spikes = exceeds & ~persistent
        skip = fault | (spikes & table.skips).any()
        usable = ~fault if policy.nonfinite == "zero" else ~fault & ~bad_grad
        judged = values.isfinite() & usable  # a loss not passed in this step is NaN
        enters = judged & (total_norm > 0) & (spikes | ~skip)
        entering = torch.where(spikes, thresholds, values)
        _update_rings(state, table, entering, enters, exceeds, judged)
    else:
        skip = fault
        spikes = torch.empty(0, dtype=torch.bool, device=device)
        thresholds = torch.empty(0, dtype=torch.float64, device=device)

    norms = stats.segment_norms
    if policy.nonfinite == "propagate":
        norms = propagated_norms(norms, stats.segment_counts)
    clip_coef = clip_coefficients(norms, policy.max_norm)
    if table is not None:
        limit = torch.where(spikes & table.clips, thresholds, math.inf).amin()
        spike_coef = clip_coefficients(total_norm, limit)
        clip_coef = torch.minimum(clip_coef, spike_coef)  # `minimum` keeps NaN
    multiplier = clip_coef if signals.inv_scale is None else clip_coef * signals.inv_scale
    clean = bad_grad & ~skip if policy.nonfinite == "zero" else never

    if state is not None:
        _count_step(state, skip, lowers)
    return Verdict(
        clip_coef=clip_coef,
        multiplier=torch.where(skip, 1.0, multiplier),
        found_inf=skip.float(),
        clean=clean.float(),
        reason=_reason(lowers, bad_grad | overflow | too_large, loss_fault, spikes, policy),
        total_norm=total_norm,
        torch_norm=propagated_norms(total_norm, stats.segment_counts.sum(1)),
        spikes=spikes,
        thresholds=thresholds,
    )


def _thresholds(state: GuardState, table: RuleTable) -> Tensor:
    """Returns the threshold of each rule, float64 `(K,)`.

    `mean + sigma * max(std, 0.01 * |mean|, tiny)` of the filled part of its ring, or a fixed limit.
    """
    if not state.windows.shape[1]:
        return table.fixed
    filled = state.rings[:, :1]
    mask = torch.arange(state.windows.shape[1], device=filled.device) < filled
    n = filled.squeeze(1).clamp(min=1)
    mean = torch.where(mask, state.windows, 0.0).sum(1) / n
    deviation = torch.where(mask, state.windows - mean[:, None], 0.0)
    std = (deviation.square().sum(1) / n).sqrt()
    floor = torch.maximum(0.01 * mean.abs(), torch.full_like(mean, TINY))
    moving = mean + table.sigma * torch.maximum(std, floor)
    judged = (table.window > 0) & (filled.squeeze(1) >= table.warmup)
    return torch.where(judged, moving, table.fixed)


def _update_rings(
    state: GuardState,
    table: RuleTable,
    entering: Tensor,
    enters: Tensor,
    exceeds: Tensor,
    judged: Tensor,
) -> None:
    filled, at, consecutive = state.rings.unbind(1)
    moves = enters & (table.window > 0)
    if state.windows.shape[1]:
        kept = state.windows.gather(1, at[:, None]).squeeze(1)
        state.windows.scatter_(1, at[:, None], torch.where(moves, entering, kept)[:, None])
    window = table.window.clamp(min=1)
    state.rings.copy_(
        torch.stack(
            [
                torch.minimum(filled + moves, table.window),
                (at + moves) % window,
                torch.where(judged, (consecutive + 1) * exceeds, consecutive),
            ],
            dim=1,
        )
    )


def _count_step(state: GuardState, skip: Tensor, lowers: Tensor) -> None:
    skipped, for_scale = skip.long(), lowers.long()
    one = torch.ones_like(skipped)
    state.counters += torch.stack([one, 1 - skipped, skipped, skipped - for_scale, for_scale])
    state.counters[3] *= skipped


def _reason(
    lowers: Tensor, bad_grad: Tensor, loss_fault: Tensor, spikes: Tensor, policy: Policy
) -> Tensor:
    reason = torch.zeros_like(bad_grad, dtype=torch.int64)
    if policy.rules:
        on_gradient = rule_table_of(policy.rules, policy.signals, spikes.device).on_gradient
        reason = torch.where(spikes.any(), int(Reason.LOSS_SPIKE), reason)
        reason = torch.where((spikes & on_gradient).any(), int(Reason.GRAD_SPIKE), reason)
    reason = torch.where(loss_fault, int(Reason.NONFINITE_LOSS), reason)
    reason = torch.where(bad_grad, int(Reason.NONFINITE_GRAD), reason)
    return torch.where(lowers, int(Reason.LOSS_SCALE), reason)


def apply(
    bucket: GradBucket, multiplier: Tensor, clean: Tensor, changes: Tensor | None = None
) -> None:
    """Multiplies the gradients of each segment, and sets non-finite elements to 0 if `clean`.

    Does not wait for the device. Reads and writes every gradient.

    Args:
        bucket: The gradients, changed in place.
        multiplier: float64 `(S,)`.
        clean: `()`; nonzero: clean.
        changes: float32 `()`, see `Verdict`. Kernels use it to return early; it is not used here.
    """
    for grad, segment in zip(bucket.grads, bucket.segment_ids, strict=True):
        _apply_to_tensor(grad, multiplier.select(0, segment), clean)


def _apply_to_tensor(grad: Tensor, multiplier: Tensor, clean: Tensor) -> None:
    cleaned = torch.where(grad.isfinite() | (clean == 0), grad, 0.0)
    first = torch.where(multiplier < SMALLEST_FACTOR, SMALLEST_FACTOR, 1.0)
    first = first.to(factor_dtype(grad.dtype))
    factor = (multiplier / first).to(first.dtype)
    # The gradient is upcast first, because on a GPU a product of a 16-bit tensor and a float32
    # scalar rounds the scalar to 16 bits.
    product = (cleaned.to(factor.dtype) * first * factor).to(grad.dtype)
    # a product of 1 and NaN may change bits of the NaN
    grad.copy_(torch.where(factor == 1, cleaned, product))


def pack(
    row: Tensor,
    stats: GradStats,
    signals: Signals,
    verdict: Verdict,
    state: GuardState,
    lr: Tensor | None,
) -> None:
    """Writes all device values of a record into one row: see `records.device_row`.

    Args:
        row: float64 `(width,)`: the output.
        stats: The stats of the step.
        signals: The losses of the step.
        verdict: The verdict on the step.
        state: The counters after the step.
        lr: `()`: the learning rate; None: the row's entry for it is not read.
    """
    nothing = torch.zeros(1, dtype=torch.float64, device=row.device)
    head = torch.stack(
        [
            verdict.total_norm,
            verdict.clip_coef.amin(),
            verdict.found_inf.double(),
            verdict.clean.double(),
            verdict.reason.double(),
        ]
    )
    # fmt: off
    parts = [
        head, state.counters[0:4:3].double(), stats.segment_counts.sum(1),
        nothing if lr is None else lr.double().reshape(1),
        _culprit_table(stats.counts), signals.losses, verdict.spikes.double(), verdict.thresholds,
    ]
    # fmt: on
    torch.cat(parts, out=row)


def _culprit_table(counts: Tensor) -> Tensor:
    """Returns the number of bad tensors, then `(index, nan, posinf, neginf)` of the first 8.

    float64 `(33,)`; unused entries are zero.
    """
    k = min(NAMED_CULPRITS, counts.shape[1])
    table = torch.zeros(1 + 4 * NAMED_CULPRITS, dtype=torch.float64, device=counts.device)
    bad = counts.sum(0) > 0
    order = torch.arange(counts.shape[1], 0, -1, device=counts.device) * bad
    first = order.topk(k).indices
    table[0] = bad.sum()
    rows = torch.cat([first[None], counts[:, first] * bad[first]]).T
    table[1 : 1 + 4 * k] = rows.reshape(-1)
    return table
