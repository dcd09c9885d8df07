"""Stage 3, decide: whether to clip, clean, skip or apply, given the stats.

    clip_coef[s] = min(1, max_norm[s] / (norm[s] + 1e-6))            torch's formula
    found_inf    = 1 if the step is skipped, else 0                  exact, float32, shape ()
    multiplier   = clip_coef * inv_scale, and 1 for a skipped step   the factor in stage apply

Only the stats are read, no gradients. Every comparison documents its result for NaN.
"""

from __future__ import annotations

import math

from fastguard.errors import NonFiniteGradError, describe_culprits
from fastguard.gradients.tensor_kinds import PLAIN, WRAPPED
from fastguard.stages import backend
from fastguard.stages.adaptive_limits import learn, set_limits
from fastguard.stages.contract import GuardState, Policy, Signals, Verdict, only_lowers_scale
from fastguard.stages.grad_stats import GradStats

# The message of torch for `error_if_nonfinite=True`, which programs may search for.
TORCH_SENTENCE = (
    "The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it "
    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm "
    "anyway, set `error_if_nonfinite=False`"
)


def decide(stats: GradStats, signals: Signals, state: GuardState | None, policy: Policy) -> Verdict:
    """Makes the decision about a step and updates `state`. Does not wait for a GPU.

    Args:
        stats: The stats of all ranks.
        signals: Losses and scaler.
        state: Counters and baselines, changed in place; None for a single call without rules.
        policy: The settings. In raise mode, the caller must call `raise_if_nonfinite` first.

    Returns:
        The verdict.
    """
    stages = backend.stages(stats.summary.device, stats.kind)
    if policy.adaptive is None or state is None or (policy.on_host and stats.kind is PLAIN):
        return stages.decide(stats, signals, state, policy)
    set_limits(stats, state, policy)
    verdict = stages.decide(stats, signals, state, policy)
    learn(stats, verdict, state, policy)
    return verdict


def raise_if_nonfinite(
    stats: GradStats, signals: Signals | None = None, *, as_torch: bool = False
) -> None:
    """Raises an error if the step is non-finite, before anything is changed. Waits for a GPU.

    Args:
        stats: The stats of the step.
        signals: The losses and the scaler; None: only gradients are checked.
        as_torch: Whether the message begins with torch's message for `error_if_nonfinite=True`.

    Raises:
        NonFiniteGradError: A gradient element or a loss is NaN or Inf, and a lower loss scale does
            not fix it; or all elements are finite, but their norm exceeds float64.
    """
    if stats.kind is not PLAIN:
        _raise_if_wrapped_are_bad(stats, as_torch)
        return
    if signals is not None and (lowers := only_lowers_scale(signals)) is not None and lowers:
        return
    nan, posinf, neginf = (int(n) for n in stats.segment_counts.sum(1).tolist())
    if nan or posinf or neginf:
        culprits = stats.culprits()
        where = describe_culprits(culprits) if culprits else _other_ranks(signals)
        message = (
            f"gradients are non-finite ({nan} NaN, {posinf} +Inf, {neginf} -Inf) in {where}; "
            "nothing was changed"
        )
        raise NonFiniteGradError(_with_torch_message(message, stats, as_torch), culprits)
    on_ranks = signals is not None and signals.bad_ranks is not None
    may_exceed = stats.rooted or stats.norm_type < 1.0 or on_ranks
    if may_exceed and stats.total_norm64.item() == math.inf:
        message = (
            f"the norm of order {stats.norm_type} of the gradients exceeds the largest float64, "
            "although every element is finite; nothing was changed"
        )
        raise NonFiniteGradError(_with_torch_message(message, stats, as_torch), [])
    # the value is 0 for a loss that no rank passed
    losses = [] if signals is None else signals.losses.tolist()
    bad = [(i, loss) for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if signals is not None and bad:
        # Losses are indexed by position, since this rank may not know the names that other ranks
        # passed.
        listed = ", ".join(f"{signals.loss_names[i]}={loss}" for i, loss in bad)
        raise NonFiniteGradError(f"the loss is non-finite: {listed}; nothing was changed")


def _raise_if_wrapped_are_bad(stats: GradStats, as_torch: bool) -> None:
    """Raises an error without culprits for wrapped gradients, whose layers may differ.

    Placeholders hold no numbers to check.
    """
    if stats.kind is WRAPPED and stats.found_nonfinite.item():
        message = "gradients are non-finite; nothing was changed"
        raise NonFiniteGradError(_with_torch_message(message, stats, as_torch))


def _with_torch_message(message: str, stats: GradStats, as_torch: bool) -> str:
    if not as_torch:
        return message
    return f"{TORCH_SENTENCE.format(norm_type=stats.norm_type)}. Here {message}"


def _other_ranks(signals: Signals | None) -> str:
    n, rank = (0, None) if signals is None else signals.culprit_rank
    return f"parameters of rank {rank}" if n == 1 else f"parameters of {n or 'other'} ranks"
