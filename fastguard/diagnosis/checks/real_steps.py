"""A few real steps on the batch: a model that can learn at all learns one batch by heart."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastguard.diagnosis.evidence import Evidence
from fastguard.diagnosis.finding import Finding

CHECK = "real steps"


def check(evidence: Evidence) -> Iterator[Finding]:
    """Trains for some steps, if there is a finite loss to go down."""
    evidence = evidence.repaired
    reason = _why_not(evidence)
    if reason:
        yield Finding(CHECK, "not-checked", "note", f"no steps were taken: {reason}")
        return
    seen = evidence.real_steps
    first, *after = seen.losses
    told = f"{len(after)} steps of {seen.optimizer} on this batch: loss {_path(seen.losses)}"
    if not all(map(math.isfinite, after)):
        yield Finding(
            CHECK,
            "diverges",
            "error",
            f"{told}; it was finite, and the steps destroyed it",
            value=next(i for i, loss in enumerate(after, 1) if not math.isfinite(loss)),
            remedy="lower the learning rate by ten, warm it up, and clip: "
            "GuardedOptimizer(max_norm=1.0).",
        )
    elif min(after) >= first:
        yield Finding(
            CHECK,
            "does-not-fall",
            "warning",
            f"{told}; it does not fall",
            value=min(after),
            limit=first,
            remedy="if it rises, the learning rate is too high; if it stays, it is too low or the "
            "gradients do not belong to this loss. A model that is done learning may do so too.",
        )
    else:
        yield Finding(CHECK, "ok", "ok", told, value=min(after), limit=first)


def _why_not(evidence: Evidence) -> str:
    step = evidence.step
    if step.failed("backward"):
        return "the backward pass raises"
    if not step.has_loss:
        return "there is no loss"
    if step.gradients is None:
        return "the loss has no gradient"
    if not evidence.is_finite:
        return "the loss or its gradients are not finite"
    return ""


def _path(losses: list[float]) -> str:
    return " -> ".join(f"{loss:.4g}" for loss in losses)
