"""Deciding a step with an adaptive limit, see `limit_rules`.

    set_limits -> decide -> learn

Before the decision, the limits of the rule are written into `Policy.max_norm`; after it, the rule
learns the norms if the step was applied. This takes a few operations on `(S,)` tensors on the
device of the stats, without waiting. There is no Triton kernel for these operations.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.stages.contract import GuardState, Policy, Verdict
from fastguard.stages.formulas import EPS, norm_of_norms
from fastguard.stages.grad_stats import GradStats
from fastguard.stages.limit_rules import AdaptiveLimit, LimitStep

if TYPE_CHECKING:
    from fastguard.stages.limit_rules import Numbers


def set_limits(stats: GradStats, state: GuardState, policy: Policy) -> None:
    """Writes the limits of this step into `policy.max_norm` and `policy.joint_limit`."""
    norms, step = _rule_inputs(stats, state)
    limit = _rule(policy).limit(norms, state.limits[1:], step)
    limit = torch.where(limit.isnan(), math.inf, limit).clamp(min=0.0)
    if policy.own is not None:
        limit = torch.where(policy.own.isnan(), limit, policy.own)
    assert isinstance(policy.joint_limit, Tensor)
    moves = norms > 0  # a segment without gradients, or with only zeros, cannot reach its limit
    joint = torch.where(moves | ~moves.any(), limit, 0.0)
    if len(joint) == 1:
        joint = limit[0]
    elif stats.norm_type == math.inf:
        joint = joint.amax()
    else:
        joint = norm_of_norms(joint, stats.norm_type)
    policy.joint_limit.copy_(joint)
    judged = moves & norms.isfinite()
    policy.max_norm.copy_(torch.where(judged, limit + EPS * (limit / norms), limit))


def compensate_eps(limit: float, norm: float) -> float:
    """Returns a slightly higher limit, for which `decide` clips the norm to exactly `limit`.

    torch's formula adds EPS to the norm, so it halves a gradient whose norm equals a limit of 1e-6.
    A rule that follows small norms would thus lower its own limit in every step.
    """
    return limit + EPS * (limit / norm) if 0 < norm < math.inf else limit


def learn(stats: GradStats, verdict: Verdict, state: GuardState, policy: Policy) -> None:
    """Updates the numbers of the rule with the norms of a step, if the step was applied."""
    norms, step = _rule_inputs(stats, state)
    before = state.limits
    learned = _rule(policy).learn(norms, before[1:], step)
    if not isinstance(learned, Tensor):
        learned = torch.stack(list(learned)) if learned else before[1:]
    after = torch.cat([before[:1] + 1, learned])
    # The comparison is False for NaN.
    is_learned = (verdict.found_inf == 0) & (norms > 0) & norms.isfinite()
    if policy.nonfinite != "zero":
        is_learned = is_learned & (stats.segment_counts.sum() == 0)
    is_learned = is_learned & ~after.isnan().any(0)
    after = torch.where(is_learned, after, before)
    if state.undo is not None:
        state.undo.append(partial(before.copy_, before.clone()))
    before.copy_(after)


def numbers_of(state: GuardState) -> Numbers:
    """Returns the numbers of a single segment, `(seen, *numbers)`, for `AdaptiveLimit.on_host`.

    The view is cached until `state.limits` is replaced, since creating it takes as long as a rule.
    """
    held = state.host_limits
    if held is None or held[0] is not state.limits:
        view: Numbers = state.limits.numpy().ravel().data  # type: ignore[assignment]
        held = state.host_limits = state.limits, view
    return held[1]


def _rule_inputs(stats: GradStats, state: GuardState) -> tuple[Tensor, LimitStep]:
    return stats.segment_norms, LimitStep(stats.total_norm64, state.limits[0])


def _rule(policy: Policy) -> AdaptiveLimit:
    assert policy.adaptive is not None
    return policy.adaptive
