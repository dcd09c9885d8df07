"""The decide stage in Python floats, for a CPU, where reading a tensor needs no synchronization.

Computes the same as `reference.decide`, in the same order and with the same state. On a CPU, two
dozen tensor operations on single numbers take 40 µs; the same arithmetic on Python floats takes
5 µs. The verdict also holds its values as Python numbers (`HostVerdict.known`), for the apply stage
and the records.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from fastguard.gradients.tensor_kinds import lasting
from fastguard.stages.adaptive_limits import compensate_eps, numbers_of
from fastguard.stages.contract import GuardState, HostVerdict, Known, NonFinite, Policy, Signals
from fastguard.stages.formulas import EPS, TINY, clip_coefficients, propagated_norms
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.reason import Reason
from fastguard.stages.spike_rules import GRAD_NORM


def _float64(x: float | list[float]) -> Tensor:
    return torch.from_numpy(np.array(x, np.float64))  # takes a third of the time of torch.tensor


# Constants of most verdicts. They are created once, which saves 1.5 µs each, and never written to.
with lasting():
    _NO, _YES = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (0.0, 1.0))
    _REASONS = tuple(torch.tensor(int(reason), device="cpu") for reason in Reason)
    _NO_SPIKES = torch.empty(0, dtype=torch.bool, device="cpu")
    _NO_THRESHOLDS = torch.empty(0, dtype=torch.float64, device="cpu")
_NONE = (0, 0, 0)


def decide(
    stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy
) -> HostVerdict:
    """See `fastguard.stages.decide.decide`."""
    sums, *counts = stats.summary.tolist()
    total_norm = _total_norm(stats, sums)
    bad_grad = any(map(any, counts))
    overflow = signals.found_inf is not None and signals.found_inf.item() > 0
    losses, bad_loss = {}, False
    if signals.loss_names:
        losses = dict(zip(signals.loss_names, signals.losses.tolist(), strict=True))
        bad_loss = not all(map(math.isfinite, losses.values()))
    lowers = overflow and not bad_loss and _scale_falls(signals)
    grad_fault, loss_fault = _faults(policy.nonfinite, bad_grad, bad_loss, overflow, lowers)
    # The norm of finite elements exceeds float64. Propagate mode clips such gradients to zero, as
    # torch does.
    too_large = total_norm == math.inf and policy.nonfinite != "propagate"
    fault = grad_fault or loss_fault or too_large

    thresholds: list[float] = []
    spikes: list[bool] = []
    skip = fault
    spike_limit = math.inf
    if state is not None and policy.rules:
        values = [total_norm if s == GRAD_NORM else losses.get(s, math.nan) for s in policy.signals]
        thresholds = _thresholds(state, policy)
        spikes = _spikes(state, policy, values, thresholds, fault)
        skip = fault or any(r.action == "skip" for r in compress(policy.rules, spikes))
        spike_limit = _spike_limit(policy, spikes, thresholds)
        if not fault and (policy.nonfinite == "zero" or not bad_grad):
            _update_rings(state, policy, values, thresholds, spikes, skip, total_norm > 0)

    limit, max_norm = None, policy.max_norm
    if policy.on_host and state is not None:
        enters = not skip and (policy.nonfinite == "zero" or not bad_grad)
        limit = _adapted(state, policy, total_norm, enters)
        max_norm = compensate_eps(limit, total_norm)
    coefs = _clip_coefs(stats, policy, max_norm, spike_limit, total_norm, sums, bad_grad)
    clip_coef = coefs if isinstance(coefs, Tensor) else _float64([coefs])
    multiplier, smallest = clip_coef, _smallest(coefs)
    multiplies = smallest != 1.0  # the comparison is True for NaN
    if skip:
        multiplier, multiplies = torch.ones_like(clip_coef), False
    elif signals.inv_scale is not None:
        multiplier = clip_coef * signals.inv_scale
        multiplies = any(m != 1.0 for m in multiplier.tolist())
    clean = policy.nonfinite == "zero" and bad_grad and not skip
    reason = _reason(lowers, bad_grad or overflow or too_large, loss_fault, spikes, policy)
    step, in_a_row = (0, 0) if state is None else _count_step(state, skip, lowers)
    norm = _float64(total_norm)
    return HostVerdict(
        clip_coef=clip_coef,
        multiplier=multiplier,
        found_inf=_YES if skip else _NO,
        clean=_YES if clean else _NO,
        reason=_REASONS[reason],
        total_norm=norm,
        torch_norm=_float64(_torch_norm(total_norm, counts)) if bad_grad else norm,
        spikes=torch.tensor(spikes, device="cpu") if spikes else _NO_SPIKES,
        thresholds=_float64(thresholds) if spikes else _NO_THRESHOLDS,
        known=Known(
            total_norm=total_norm,
            clip_coef=smallest,
            skipped=skip,
            cleaned=clean,
            changes_gradients=clean or multiplies,
            reason=reason,
            nonfinite_counts=[int(sum(each)) for each in counts] if bad_grad else _NONE,
            losses=losses,
            spikes=spikes,
            thresholds=thresholds,
            step=step,
            consecutive_skips=in_a_row,
            limit=limit,
        ),
    )


def _total_norm(stats: GradStats, sums: list[float]) -> float:
    """Returns the norm of the whole model; inf if it exceeds float64."""
    if stats.rooted and len(sums) == 1:
        return sums[0]
    if stats.rooted or stats.norm_type != 2.0:
        return stats.total_norm64.item()
    return math.sqrt(sum(sums))  # `fsum` and `**` would raise an error on overflow


def _adapted(state: GuardState, policy: Policy, norm: float, enters: bool) -> float:
    """Returns the limit of the adaptive rule; if `enters`, the rule learns the norm."""
    assert policy.adaptive is not None and policy.adaptive.on_host is not None
    held = state.host_limits
    numbers = held[1] if held is not None and held[0] is state.limits else numbers_of(state)
    learns = enters and 0.0 < norm < math.inf
    limit = policy.adaptive.on_host(norm, numbers, learns, state.undo)
    return limit if limit == limit else math.inf  # a NaN means no limit


def _scale_falls(signals: Signals) -> bool:
    return signals.scale_falls is not None and bool(signals.scale_falls)


def _faults(
    nonfinite: NonFinite, bad_grad: bool, bad_loss: bool, overflow: bool, lowers: bool
) -> tuple[bool, bool]:
    """Returns whether gradients, and whether a loss, require skipping the step."""
    if nonfinite == "propagate":
        return overflow, False
    # Cleaning fixes the elements that were counted, but not an overflow that only the scaler found.
    # An overflow that a lower scale fixes is not cleaned, because this would set the largest
    # gradients to zero.
    cured = nonfinite == "zero" and bad_grad and not lowers
    return (overflow or bad_grad) and not cured, bad_loss


def _torch_norm(total_norm: float, counts: list[list[float]]) -> float:
    """Returns the norm as torch computes it: NaN if any element is NaN, else inf if any is Inf."""
    nan, posinf, neginf = map(any, counts)
    if nan:
        return math.nan
    return math.inf if posinf or neginf else total_norm


def _clip_coefs(
    stats: GradStats,
    policy: Policy,
    max_norm: float | Tensor,
    spike_limit: float,
    total_norm: float,
    sums: list[float],
    bad_grad: bool,
) -> float | Tensor:
    """Returns the clip coefficients: a number for one segment, else float64 `(S,)`.

    NaN occurs only in propagate mode.
    """
    propagates = bad_grad and policy.nonfinite == "propagate"
    if len(sums) == 1 and not propagates:
        limit = max_norm.item() if isinstance(max_norm, Tensor) else max_norm
        return min(_coef(total_norm, limit), _coef(total_norm, spike_limit))
    norms = stats.segment_norms
    if propagates:
        norms = propagated_norms(norms, stats.segment_counts)
    limits = max_norm if isinstance(max_norm, Tensor) else _float64([max_norm])
    coefs = clip_coefficients(norms, limits)
    return coefs.clamp(max=_coef(total_norm, spike_limit))  # `clamp` keeps NaN


def _smallest(coefs: float | Tensor) -> float:
    if not isinstance(coefs, Tensor):
        return coefs
    return coefs.amin().item() if len(coefs) else 1.0  # `amin` gives NaN if any coefficient is NaN


def _coef(norm: float, limit: float) -> float:
    return 1.0 if limit == math.inf else min(limit / (norm + EPS), 1.0)  # min(NaN, 1.0) is NaN


def _thresholds(state: GuardState, policy: Policy) -> list[float]:
    """Returns the threshold of each rule.

    `mean + sigma * max(std, 0.01 * |mean|, tiny)` of the filled part of its ring, or a fixed limit.
    """
    thresholds = []
    filled = state.rings[:, 0].tolist()
    for k, rule in enumerate(policy.rules):
        if not rule.window:
            thresholds.append(rule.fixed)
            continue
        n = filled[k]
        if n < rule.warmup:
            thresholds.append(math.inf)
            continue
        ring = state.windows[k, :n].tolist()
        mean = sum(ring) / n
        std = math.sqrt(sum([(x - mean) * (x - mean) for x in ring]) / n)
        thresholds.append(mean + rule.sigma * max(std, 0.01 * abs(mean), TINY))
    return thresholds


def _spikes(
    state: GuardState, policy: Policy, values: list[float], thresholds: list[float], fault: bool
) -> list[bool]:
    in_a_row = state.rings[:, 2].tolist()
    spikes = []
    for k, rule in enumerate(policy.rules):
        exceeds = not fault and values[k] > thresholds[k]  # the comparison is False for NaN
        persistent = rule.window > 0 and in_a_row[k] >= rule.window
        spikes.append(exceeds and not persistent)
    return spikes


def _spike_limit(policy: Policy, spikes: list[bool], thresholds: list[float]) -> float:
    """Returns the norm to which spikes are clipped; inf if no rule with "clip" found a spike."""
    judged = zip(policy.rules, spikes, thresholds, strict=True)
    return min((t for r, spike, t in judged if spike and r.action == "clip"), default=math.inf)


def _update_rings(
    state: GuardState,
    policy: Policy,
    values: list[float],
    thresholds: list[float],
    spikes: list[bool],
    skip: bool,
    moved: bool,
) -> None:
    rings = state.rings.numpy()
    windows = state.windows.numpy()
    for k, rule in enumerate(policy.rules):
        if not math.isfinite(values[k]):  # a loss not passed in this step is NaN
            continue
        if state.undo is not None:
            state.undo.append(partial(rings.__setitem__, k, rings[k].copy()))
        rings[k, 2] = rings[k, 2] + 1 if values[k] > thresholds[k] else 0
        enters = moved and (spikes[k] or not skip)
        if enters and rule.window:
            at = rings[k, 1]
            if state.undo is not None:
                state.undo.append(partial(windows.__setitem__, (k, at), windows[k, at]))
            windows[k, at] = thresholds[k] if spikes[k] else values[k]
            rings[k, 0] = min(rings[k, 0] + 1, rule.window)
            rings[k, 1] = (at + 1) % rule.window


def _count_step(state: GuardState, skip: bool, lowers: bool) -> tuple[int, int]:
    """Counts the step; returns its number and the number of consecutive skipped incidents."""
    counters = state.counters.numpy()
    step, applied, skipped, in_a_row, for_scale = before = counters.tolist()
    if state.undo is not None:
        state.undo.append(partial(counters.__setitem__, ..., before))
    step += 1
    counters[0] = step
    if lowers:
        counters[2], counters[4] = skipped + 1, for_scale + 1
    elif skip:
        in_a_row += 1
        counters[2], counters[3] = skipped + 1, in_a_row
    else:
        in_a_row = 0
        counters[1], counters[3] = applied + 1, 0
    return step, in_a_row


def _reason(
    lowers: bool, bad_grad: bool, loss_fault: bool, spikes: list[bool], policy: Policy
) -> Reason:
    if lowers:
        return Reason.LOSS_SCALE
    if bad_grad:
        return Reason.NONFINITE_GRAD
    if loss_fault:
        return Reason.NONFINITE_LOSS
    spiked = list(compress(policy.signals, spikes))
    if GRAD_NORM in spiked:
        return Reason.GRAD_SPIKE
    return Reason.LOSS_SPIKE if spiked else Reason.NONE
